"""Accuracy against the most positives of other images (Table 5 of the paper)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.runner import Claim, main

CAPS = (0, 2, 4, 6, 8, -1)  # beside the anchor's own other view; -1: all


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """SupCon with each cap; capped positives leave the denominator too."""
    return {
        "all" if cap < 0 else str(cap): with_fields(
            base(scale, "supcon", data), {"supcon.objective.positives_cap": cap}
        )
        for cap in (CAPS if scale != "smoke" else (0, -1))
    }


CLAIMS = [
    Claim(
        "more positives are better: all against none of other images",
        "78.5 over 69.3",
        "all/top1",
        "0/top1",
    ),
    Claim("more positives are better: all against two", "78.5 over 76.6", "all/top1", "2/top1"),
]

if __name__ == "__main__":
    main(settings, CLAIMS)
