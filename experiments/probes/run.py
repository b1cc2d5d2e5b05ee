"""The fast linear probe beside the trained linear stage, on the same frozen encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base
from experiments.runner import Values, main
from supcon_jax.logs import read_metrics
from supcon_jax.suites import Subject, of_logits, open_subject, sgd_probe
from supcon_jax.trained import open_run

METHODS = {**RECIPES, "SimCLR": "simclr"}
RATES = {"supcon": 9.0, "cross_entropy": 1 / 3, "simclr": 27.0}  # see rates.py
EPOCHS = 6.0  # of the linear stage where it has more images than the encoder had
PLAIN = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0}
PROBES = ("SGD", "SGD without augmentation")


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of each method."""
    return {name: base(scale, recipe, data) for name, recipe in METHODS.items()}


def probed(workdir: Path, config: ConfigDict, results: Mapping[str, Any]) -> Mapping[str, float]:
    """Test top-1 of the probes on one encoder, in per cent, from all training images."""
    del config, results
    subject = opened(workdir)
    found = {"fast": of_logits(subject.probed(subject.test), subject.test.labels)["top1"]}
    for name in PROBES:
        if name != "SGD":
            subject.run.config.linear.augment.update(PLAIN)
        found[name] = by_sgd(subject, name)["top1"]
    return {name: 100 * top1 for name, top1 in found.items()}


def by_sgd(subject: Subject, name: str) -> dict[str, float]:
    """Top-1 of the linear stage as it is configured: "top1" on test images, "heldout" if any are.

    Args:
      subject: the encoder.
      name: of the folder of its logs.
    """
    folder = subject.run.workdir / "evaluation" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = {"top1": sgd_probe(subject, folder)["top1"]}
    for record in read_metrics(folder / f"sgd_probe-{subject.slug}"):
        if "heldout/top1" in record:
            found["heldout"] = record["heldout/top1"]
    return found


def opened(workdir: Path) -> Subject:
    """The encoder of a run, on all images of its data set."""
    run = open_run(workdir)
    if run.config.data.per_class:
        run.config.data.per_class = 0
        run.config.linear.update(epochs=EPOCHS, warmup_epochs=EPOCHS / 10)
        run.config.linear.schedule.learning_rate = RATES[run.config.stages[0]]
    return open_subject(run, "encoder", None, None)


def differences(values: Values) -> Values:
    """Fast less SGD, of each method."""
    return {
        f"{method}, fast less {name}": [
            fast - slow
            for fast, slow in zip(values[f"{method}/fast"], values[f"{method}/{name}"], strict=True)
        ]
        for method in METHODS
        for name in PROBES
    }


CLAIMS = ()

if __name__ == "__main__":
    main(settings, CLAIMS, measure=probed, derive=differences)
