"""Accuracy with rare classes: SupCon against cross-entropy on long-tailed training images."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

RATIOS = (1.0, 10.0, 50.0)  # images of the first class over those of the last


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses at each ratio, from the same number of images of the first class."""
    return {
        f"{ratio:g}: {name}": with_fields(base(scale, recipe, data), fields(scale, ratio))
        for ratio in (RATIOS if scale != "smoke" else (1.0, 10.0))
        for name, recipe in RECIPES.items()
    }


def fields(scale: str, ratio: float) -> dict[str, object]:
    """At the cpu scale a share of each class: the first one has 200 images at every ratio."""
    of_cpu = {"data.per_class": 0, "data.fraction": 200 / 6000}
    return {"data.imbalance": ratio, **(of_cpu if scale == "cpu" else {})}


CLAIMS = [
    Claim(
        f"SupCon is more accurate than cross-entropy at a ratio of {ratio:g}",
        "not in the paper",
        f"{ratio:g}: SupCon/top1",
        f"{ratio:g}: cross-entropy/top1",
    )
    for ratio in RATIOS
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("images of the first class, for one of the last"))
