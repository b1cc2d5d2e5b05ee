"""Accuracy for pairs of augmentations: of pre-training and of the linear stage (Table 9)."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.runner import Claim, Values, main

POLICIES = {
    "smoke": ("crop_flip", "sim_augment"),
    "cpu": ("crop_flip", "sim_augment", "auto_augment"),
    "gpu": ("crop_flip", "sim_augment", "auto_augment", "rand_augment"),
    "paper": ("sim_augment", "auto_augment", "rand_augment", "stacked_rand_augment"),
}
# Of the colours: the published strength, and a weaker one for small images.
COLOURS = {"jitter": 1.0, "jitter_form": "tensorflow", "blur": 0.5}
WEAK = {"jitter": 0.4}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """SupCon with each policy in each stage."""
    found = {}
    for first in POLICIES[scale]:
        for second in POLICIES[scale]:
            fields: dict[str, object] = {}
            for stage, policy in (("supcon", first), ("linear", second)):
                fields[f"{stage}.augment.name"] = policy
                colours = COLOURS if scale == "paper" else WEAK
                fields |= {f"{stage}.augment.{field}": x for field, x in colours.items()}
            config = base(scale, "supcon", data)
            if scale == "cpu":  # where the linear stage has no crops otherwise
                crops = ("crop_area", "crop_ratio")
                fields |= {f"linear.augment.{x}": config.supcon.augment[x] for x in crops}
            found[f"{first}, {second}"] = with_fields(config, fields)
    return found


def ranges(values: Values) -> Values:
    """Largest less smallest mean accuracy, over the first policy and over the second."""
    cells = {name.rpartition("/")[0]: v for name, v in values.items() if name.endswith("/top1")}
    found = {}
    for place, stage in enumerate(("pre-training", "linear stage")):
        groups: dict[str, list[list[float]]] = {}
        for cell, of_seeds in cells.items():
            groups.setdefault(cell.split(", ")[place], []).append(of_seeds)
        means = np.array([np.mean(group, axis=0) for group in groups.values()])
        found[f"range over the policies of the {stage}"] = list(np.ptp(means, axis=0))
    return found


CLAIMS = [
    Claim(
        "AutoAugment in both stages is better than SimAugment in both",
        "78.6 over 77.9",
        "auto_augment, auto_augment/top1",
        "sim_augment, sim_augment/top1",
    ),
    Claim(
        "AutoAugment in both stages is better than crops and flips alone",
        "not given",
        "auto_augment, auto_augment/top1",
        "crop_flip, crop_flip/top1",
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS, derive=ranges)
