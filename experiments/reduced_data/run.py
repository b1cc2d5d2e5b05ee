"""Accuracy with fewer training images, at equal passes: SupCon against cross-entropy."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

IMAGES = {"smoke": (60,), "cpu": (10, 20, 50, 100, 200), "gpu": (50, 100, 500, 5000)}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses for so many images a class; epochs grow as the images become fewer."""
    found = {}
    for images in IMAGES.get(scale, (13, 130, 1300)):
        for name, recipe in RECIPES.items():
            config = base(scale, recipe, data)
            largest = max(IMAGES.get(scale, (1300,)))
            fields: dict[str, object] = {"data.per_class": images}
            for stage in config.stages:
                longer = config[stage].epochs * largest / images
                fields[f"{stage}.epochs"] = longer
                fields[f"{stage}.warmup_epochs"] = longer / 10
            found[f"{images}: {name}"] = with_fields(config, fields)
    return found


CLAIMS = [
    Claim(
        f"SupCon is more accurate than cross-entropy with {images} images of each class",
        "announced, no number",
        f"{images}: SupCon/top1",
        f"{images}: cross-entropy/top1",
    )
    for images in (10, 20, 50, 100, 200, 500, 5000)
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("training images of each class"))
