"""Accuracy against the projection: none of its layers hidden, one, two, wide, with batch norm."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.runner import Claim, main

HEADS = {  # layers at the cpu scale, times 8 at larger ones; batch norm in hidden ones
    "linear": ((64,), False),
    "one hidden layer": ((64, 64), False),
    "one hidden layer, batch norm": ((64, 64), True),
    "two hidden layers, batch norm": ((64, 64, 64), True),
    "linear, wide": ((512,), False),
}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """SupCon with each projection."""
    names = tuple(HEADS) if scale != "smoke" else ("linear", "one hidden layer")
    factor = 8 if scale in ("gpu", "paper") else 1
    return {
        name: with_fields(
            base(scale, "supcon", data),
            {
                "supcon.head.layers": tuple(factor * size for size in HEADS[name][0]),
                "supcon.head.batch_norm": HEADS[name][1],
            },
        )
        for name in names
    }


CLAIMS = [
    Claim(
        "a hidden layer in the projection is better than none",
        "not given",
        "one hidden layer/top1",
        "linear/top1",
    )
]

if __name__ == "__main__":
    main(settings, CLAIMS)
