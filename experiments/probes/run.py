"""The fast linear probe beside the trained linear stage, on the same frozen encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base
from experiments.runner import Values, main
from supcon_jax.evaluation.probe import PENALTIES, fit_probe, predict_logits
from supcon_jax.suites import of_logits, open_subject, sgd_probe
from supcon_jax.trained import open_run

METHODS = {**RECIPES, "SimCLR": "simclr"}
TIMES = {"SGD": 1, "SGD, 5 times as long": 5}  # the epochs of the base recipe


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of each method."""
    return {name: base(scale, recipe, data) for name, recipe in METHODS.items()}


def probed(workdir: Path, config: ConfigDict, results: Mapping[str, Any]) -> Mapping[str, float]:
    """Test top-1 of the probes on one encoder, in per cent."""
    del results
    subject = open_subject(open_run(workdir), "encoder", None, None)
    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    train, test = subject.train, subject.test
    least = fit_probe(train.features, train.labels, classes=subject.classes, l2=min(PENALTIES))
    found = {
        "fast": of_logits(subject.probed(test), test.labels)["top1"],
        "fast, least penalty": of_logits(predict_logits(least, test.features), test.labels)["top1"],
    }
    for name, times in TIMES.items():
        subject.run.config.linear.epochs = times * config.linear.epochs
        found[name] = sgd_probe(subject, folder)["top1"]
    return {name: 100 * top1 for name, top1 in found.items()}


def differences(values: Values) -> Values:
    """Fast less SGD, of each method."""
    return {
        f"{method}, fast less {name}": [
            fast - slow
            for fast, slow in zip(values[f"{method}/fast"], values[f"{method}/{name}"], strict=True)
        ]
        for method in METHODS
        for name in TIMES
    }


CLAIMS = ()

if __name__ == "__main__":
    main(settings, CLAIMS, measure=probed, derive=differences)
