"""Accuracy for pairs of optimizers: of pre-training and of the linear stage (Table 8)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.runner import Claim, main

RATES = {  # learning rates of pre-training and of the linear stage, set by hand
    "sgd": (0.5, 1.0),
    "lars": (1.0, 1.0),
    "rmsprop": (0.003, 0.01),
    "adamw": (0.003, 0.01),
}
BATCH = 6144 / 256  # the paper's: it tuned each rate and does not give them, but for two
PAPER_RATES = {
    "sgd": (0.1 * BATCH, 0.1 * BATCH),  # as cross-entropy's and SimCLR's linear stage
    "lars": (0.4 * BATCH, 0.1 * BATCH),  # published for pre-training
    "rmsprop": (0.05 * BATCH, 0.05 * BATCH),  # published for the linear stage
}
DECAY = {"lars": "lars", "adamw": "decoupled"}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """SupCon with each optimizer in each stage."""
    rates = PAPER_RATES if scale == "paper" else RATES
    names = [name for name in rates if name != "adamw" or scale != "cpu"]
    pairs = [(first, second) for first in names for second in names]
    longer: dict[str, object] = {"linear.epochs": 350.0} if scale == "paper" else {}
    return {
        f"{first}, {second}": with_fields(
            base(scale, "supcon", data),
            of_stage("supcon", first, rates[first][0])
            | of_stage("linear", second, rates[second][1])
            | longer,
        )
        for first, second in (
            pairs if scale != "smoke" else (("lars", "rmsprop"), ("adamw", "lars"))
        )
    }


def of_stage(stage: str, name: str, rate: float) -> dict[str, object]:
    """An optimizer of a stage."""
    return {
        f"{stage}.optimizer.name": name,
        f"{stage}.optimizer.weight_decay_kind": DECAY.get(name, "l2"),
        f"{stage}.schedule.learning_rate": rate,
    }


CLAIMS = [
    Claim(
        "LARS is better than RMSProp for pre-training",
        "78.7 over 77.8 (linear stage: RMSProp)",
        "lars, rmsprop/top1",
        "rmsprop, rmsprop/top1",
    ),
    Claim(
        "LARS is better than SGD with momentum for pre-training",
        "78.7 over 76.1 (linear stage: RMSProp)",
        "lars, rmsprop/top1",
        "sgd, rmsprop/top1",
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS)
