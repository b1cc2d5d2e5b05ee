"""The fast linear probe beside the trained linear stage, on the same frozen encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base
from experiments.pictures import dots
from experiments.runner import Values, main
from supcon_jax.logs import read_metrics
from supcon_jax.suites import Subject, of_logits, open_subject, sgd_probe
from supcon_jax.trained import open_run

METHODS = {**RECIPES, "SimCLR": "simclr"}
RATE = "SGD's rate"
STEP = 3.0  # from one learning rate that is tried to the next
HOLDOUT = 0.1  # of the training images, to choose a rate; the fast probe so chooses its penalty
SEARCH = 0.2  # of the length, for each rate that is tried
EPOCHS = 10.0  # of the linear stage where it has more images than the encoder had


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of each method."""
    return {name: base(scale, recipe, data) for name, recipe in METHODS.items()}


def probed(workdir: Path, config: ConfigDict, results: Mapping[str, Any]) -> Mapping[str, float]:
    """Test top-1 of both probes on one encoder, in per cent, from all training images."""
    del config, results
    rate = best_rate(opened(workdir, holdout=HOLDOUT))
    subject = opened(workdir, holdout=0.0)
    fast = of_logits(subject.probed(subject.test), subject.test.labels)["top1"]
    slow = by_sgd(subject, rate)["top1"]
    return {"fast": 100 * fast, "SGD": 100 * slow, RATE: rate}


def best_rate(subject: Subject) -> float:
    """The learning rate with the best held-out top-1 after a part of the length.

    The recipe's, 3 and 9 times that, and on in either direction while the best is at an end.
    """
    stage = subject.run.config.linear
    first = stage.schedule.learning_rate
    stage.update(epochs=SEARCH * stage.epochs, warmup_epochs=SEARCH * stage.warmup_epochs)
    heldout: dict[int, float] = {}
    ahead = [0, 1, 2]
    while ahead:
        for power in ahead:
            heldout[power] = by_sgd(subject, first * STEP**power)["heldout"]
        best = max(heldout, key=heldout.__getitem__)
        ahead = [power for power in (best - 1, best + 1) if power not in heldout]
    return first * STEP**best


def by_sgd(subject: Subject, rate: float) -> dict[str, float]:
    """Test top-1 of the linear stage at a learning rate, and the held-out one where there is."""
    config = subject.run.config
    config.linear.schedule.learning_rate = rate
    config.evaluation.every_epochs = config.linear.epochs
    folder = subject.run.workdir / "evaluation" / f"rate-{rate:g}-holdout-{config.data.holdout:g}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {"top1": sgd_probe(subject, folder)["top1"]}
    for record in read_metrics(folder / f"sgd_probe-{subject.slug}"):
        if "heldout/top1" in record:
            found["heldout"] = record["heldout/top1"]
    return found


def opened(workdir: Path, holdout: float) -> Subject:
    """The encoder of a run, on all images of its data set but those held out."""
    run = open_run(workdir)
    run.config.data.holdout = holdout
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


def draw(record: dict[str, Any], file: Path) -> None:
    """The accuracies, without the learning rates that were chosen."""
    shown = {of: found for of, found in record["quantities"].items() if not of.endswith(RATE)}
    dots(record | {"quantities": shown}, file)


CLAIMS = ()

if __name__ == "__main__":
    main(settings, CLAIMS, measure=probed, derive=differences, draw=draw)
