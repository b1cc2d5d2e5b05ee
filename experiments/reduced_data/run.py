"""Accuracy with fewer training images, at equal passes: SupCon against cross-entropy."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

IMAGES = {"smoke": (60,), "cpu": (10, 20, 50, 100, 200), "gpu": (50, 100, 500, 5000)}
SHARES = (0.01, 0.1, 1.0)  # of ImageNet, whose classes differ in size
CLASSES = 10  # of the other scales' data sets
IMAGENET = 1_281_167


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses for so many images; epochs grow as the images become fewer."""
    field = "data.fraction" if scale == "paper" else "data.per_class"
    found, largest = {}, max(images_of(scale).values())
    for part, images in images_of(scale).items():
        for name, recipe in RECIPES.items():
            config = with_fields(base(scale, recipe, data), {field: part})
            config.checkpoint.every_epochs *= largest / images
            for stage in config.stages:
                lengthen(config[stage], images, largest)
            found[f"{part}: {name}"] = config
    return found


def images_of(scale: str) -> dict[float, int]:
    """Images in all, by images of each class, or by the share of ImageNet."""
    if scale == "paper":
        return {share: int(share * IMAGENET) for share in SHARES}
    return {count: CLASSES * count for count in IMAGES[scale]}


def lengthen(stage: ConfigDict, images: int, largest: int) -> None:
    """As many passes over few images as the stage makes over the largest number of them.

    A batch that would be larger than all images is them, at a learning rate in proportion.
    """
    batch = min(stage.batch_size, images)
    passes = stage.epochs * (largest // stage.batch_size) * stage.batch_size
    epochs = passes / (images // batch * batch)
    rate = stage.schedule.learning_rate * batch / stage.batch_size
    stage.update(batch_size=batch, epochs=epochs, warmup_epochs=epochs / 10)
    stage.schedule.learning_rate = rate


CLAIMS = [
    Claim(
        f"SupCon is more accurate than cross-entropy with {words}",
        "announced, no number",
        f"{part}: SupCon/top1",
        f"{part}: cross-entropy/top1",
    )
    for part, words in {
        **{n: f"{n} images of each class" for n in (10, 20, 50, 100, 200, 500, 5000)},
        **{share: f"{share:.0%} of ImageNet" for share in SHARES},
    }.items()
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("training images of each class"))
