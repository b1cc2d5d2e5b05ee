"""Accuracy and calibration on corrupted images: SupCon against cross-entropy (Fig. 3, Table 6)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.bases import RECIPES, base
from experiments.runner import Claim, main
from supcon_jax.evaluate import evaluate
from supcon_jax.suites import open_subject
from supcon_jax.trained import open_run


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of both."""
    return {name: base(scale, recipe, data) for name, recipe in RECIPES.items()}


def on_corrupted(
    workdir: Path, config: ConfigDict, results: Mapping[str, Any]
) -> Mapping[str, float]:
    """Mean error over 15 corruptions and 5 severities, and mCE; accuracy and ECE by severity."""
    del results
    features = open_subject(open_run(workdir), "encoder", None, None).name
    found = evaluate(workdir, ["robustness"])["suites"][features]["robustness"]
    clean = {"top1": 100 * found["clean"]["top1"], "ece": 100 * found["clean"]["ece"]}
    lost = 100 * (found["clean"]["top1"] - (1 - found["mean_error"]))
    return {
        **clean,
        "error on corrupted": 100 * found["mean_error"],
        "lost by corruption": lost,
        **{name: found[name] for name in ("mce", "relative_mce") if name in found},
        "ece on corrupted": 100 * sum(found["ece"]) / 5,
        **{f"top1 at {s}": 100 * x for s, x in enumerate(found["top1"], start=1)},
        **{f"ece at {s}": 100 * x for s, x in enumerate(found["ece"], start=1)},
    }


def draw(record: dict[str, Any], file: Path) -> None:
    """Accuracy (left) and calibration error (right) against the severity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axis, metric, label in zip(axes, ("top1", "ece"), ("test top-1, %", "ECE, %"), strict=True):
        for name in RECIPES:
            found = [record["quantities"][f"{name}/{metric}"]]
            found += [record["quantities"][f"{name}/{metric} at {s}"] for s in range(1, 6)]
            means, sds = (np.array([one[key] for one in found], float) for key in ("mean", "sd"))
            axis.errorbar(range(6), means, sds, marker=".", capsize=2, label=name)
        axis.set(xlabel="severity", ylabel=label)
        axis.set_xticks(range(6), ["clean", *map(str, range(1, 6))])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


CLAIMS = [
    Claim(
        "SupCon has a smaller error on corrupted images",
        "mCE 67.2 against 68.6 (ResNet-50), 50.6 against 52.4 (ResNet-200)",
        "cross-entropy/error on corrupted",
        "SupCon/error on corrupted",
    ),
    Claim(
        "SupCon loses less by corruption (clean less corrupted accuracy)",
        "relative mCE 94.6 against 96.2 (ResNet-50), 66.5 against 69.1 (ResNet-200)",
        "cross-entropy/lost by corruption",
        "SupCon/lost by corruption",
    ),
    Claim(
        "SupCon is better calibrated on clean images",
        "ECE .024 against .039 (ResNet-50), .041 against .045 (ResNet-200)",
        "cross-entropy/ece",
        "SupCon/ece",
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS, measure=on_corrupted, draw=draw)
