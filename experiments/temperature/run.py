"""Accuracy against the temperature of the loss (Fig. 4d of the paper)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, main

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """SupCon at each temperature."""
    return {
        str(t): with_fields(base(scale, "supcon", data), {"supcon.objective.temperature": t})
        for t in (TEMPERATURES if scale != "smoke" else (0.1, 1.0))
    }


CLAIMS = [
    Claim(
        f"a temperature of 0.1 is better than {t}",
        "best at 0.1; the best temperature is worth nearly 3 points",
        "0.1/top1",
        f"{t}/top1",
    )
    for t in TEMPERATURES
    if t != 0.1
]

if __name__ == "__main__":
    main(settings, CLAIMS, draw=curve("temperature"))
