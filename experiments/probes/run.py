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
FACTORS = (1.0, 3.0, 10.0)  # times the learning rate of the linear stage
HOLDOUT = 0.1  # of the training images, to choose a rate; the fast probe so chooses its penalty
EPOCHS = 3.0  # of the linear stage where it has more images than the encoder had


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of each method."""
    return {name: base(scale, recipe, data) for name, recipe in METHODS.items()}


def probed(workdir: Path, config: ConfigDict, results: Mapping[str, Any]) -> Mapping[str, float]:
    """Test top-1 of both probes on one encoder, in per cent, from all training images."""
    del results
    rates = [factor * config.linear.schedule.learning_rate for factor in FACTORS]
    heldout = {rate: by_sgd(workdir, rate, HOLDOUT)["heldout"] for rate in rates}
    best = max(heldout, key=heldout.__getitem__)
    subject = opened(workdir)
    fast = of_logits(subject.probed(subject.test), subject.test.labels)["top1"]
    return {"fast": 100 * fast, "SGD": by_sgd(workdir, best, 0.0)["test"], "SGD's rate": best}


def by_sgd(workdir: Path, rate: float, holdout: float) -> dict[str, float]:
    """Top-1 of the linear stage at a learning rate, in per cent: test, and held-out if there is."""
    subject = opened(workdir)
    config = subject.run.config
    config.linear.schedule.learning_rate = rate
    config.data.holdout = holdout
    config.evaluation.every_epochs = config.linear.epochs
    folder = workdir / "evaluation" / f"rate-{rate:g}-holdout-{holdout:g}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {"test": 100 * sgd_probe(subject, folder)["top1"]}
    for record in read_metrics(folder / f"sgd_probe-{subject.slug}"):
        if "heldout/top1" in record:
            found["heldout"] = 100 * record["heldout/top1"]
    return found


def opened(workdir: Path) -> Subject:
    """The encoder of a run, on all images of its data set."""
    run = open_run(workdir)
    if run.config.data.per_class:
        run.config.data.per_class = 0
        run.config.linear.update(epochs=EPOCHS, warmup_epochs=EPOCHS / 10)
    return open_subject(run, "encoder", None, None)


def differences(values: Values) -> Values:
    """Fast less SGD, of each method."""
    return {
        f"{method}, fast less SGD": [
            fast - slow
            for fast, slow in zip(values[f"{method}/fast"], values[f"{method}/SGD"], strict=True)
        ]
        for method in METHODS
    }


CLAIMS = ()

if __name__ == "__main__":
    main(settings, CLAIMS, measure=probed, derive=differences)
