"""Accuracy against the length of pre-training (Fig. 4c of the paper)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0)


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses for shares of the base recipe's length."""
    found = {}
    for share in SHARES if scale != "smoke" else (0.5, 1.0):
        for name, recipe in RECIPES.items():
            config = base(scale, recipe, data)
            stage = config[recipe]
            fields = {
                f"{recipe}.epochs": share * stage.epochs,
                f"{recipe}.warmup_epochs": share * stage.warmup_epochs,
            }
            found[f"{share}: {name}"] = with_fields(config, fields)
    return found


CLAIMS = [
    Claim(
        "pre-training with SupCon twice as long is better than half as long",
        "better up to 200 epochs, nearly flat from there",
        "2.0: SupCon/top1",
        "0.5: SupCon/top1",
    ),
    *(
        Claim(
            f"SupCon is more accurate than cross-entropy at {share} of the length",
            "not given",
            f"{share}: SupCon/top1",
            f"{share}: cross-entropy/top1",
        )
        for share in SHARES
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("length, share of the base recipe's"))
