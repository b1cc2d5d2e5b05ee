"""Accuracy with wrong training labels: SupCon against cross-entropy."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

SHARES = (0.0, 0.2, 0.4, 0.6)  # of labels drawn anew from all classes
METHODS = {**RECIPES, "SimCLR": "simclr"}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Each loss at each share; the linear stage has the wrong labels too."""
    return {
        f"{share}: {name}": with_fields(base(scale, recipe, data), {"data.label_noise": share})
        for share in (SHARES if scale != "smoke" else (0.4,))
        for name, recipe in METHODS.items()
    }


CLAIMS = [
    Claim(
        f"SupCon is more accurate than cross-entropy with {share:.0%} of the labels drawn anew",
        "announced, no number",
        f"{share}: SupCon/top1",
        f"{share}: cross-entropy/top1",
    )
    for share in SHARES
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("share of the labels drawn anew", scale="linear"))
