"""Accuracy against the batch size, at equal epochs (Fig. 4b of the paper)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

SIZES = {"smoke": (128, 256), "cpu": (16, 32, 64, 128, 256), "gpu": (128, 256, 512, 1024, 2048)}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses at each size; the learning rate grows with the root of the batch."""
    found = {}
    for size in SIZES.get(scale, (512, 1024, 2048, 4096, 6144)):
        for name, recipe in RECIPES.items():
            config = base(scale, recipe, data)
            stage = config[recipe]
            rate = stage.schedule.learning_rate * (size / stage.batch_size) ** 0.5
            fields = {f"{recipe}.batch_size": size, f"{recipe}.schedule.learning_rate": rate}
            found[f"{size}: {name}"] = with_fields(config, fields)
    return found


def of_batch(size: int) -> Claim:
    """SupCon against cross-entropy at a batch size."""
    text = f"SupCon is more accurate than cross-entropy at a batch of {size}"
    return Claim(text, "at every size", f"{size}: SupCon/top1", f"{size}: cross-entropy/top1")


CLAIMS = [
    of_batch(size) for size in sorted({size for sizes in SIZES.values() for size in sizes})
] + [
    Claim(
        f"a batch of {large} is better for SupCon than one of {small}",
        "better up to 6,144",
        f"{large}: SupCon/top1",
        f"{small}: SupCon/top1",
    )
    for small, large in ((16, 256), (128, 2048))
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("images in a batch"))
