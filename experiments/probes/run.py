"""The fast linear probe beside the trained linear stage, on the same frozen encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base
from experiments.runner import Values, main
from supcon_jax.evaluate import evaluate

METHODS = {**RECIPES, "SimCLR": "simclr"}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The base recipe of each method."""
    return {name: base(scale, recipe, data) for name, recipe in METHODS.items()}


def probed(workdir: Path, config: ConfigDict, results: Mapping[str, Any]) -> Mapping[str, float]:
    """Test top-1 of both probes, in per cent."""
    del config, results
    (suites,) = evaluate(workdir, ["standard", "sgd_probe"])["suites"].values()
    return {
        "SGD": 100 * suites["sgd_probe"]["top1"],
        "fast": 100 * suites["standard"]["probe"]["top1"],
    }


def differences(values: Values) -> Values:
    """Fast less SGD, of each method."""
    return {
        f"{name}, fast less SGD": [
            fast - slow
            for fast, slow in zip(values[f"{name}/fast"], values[f"{name}/SGD"], strict=True)
        ]
        for name in METHODS
    }


CLAIMS = ()

if __name__ == "__main__":
    main(settings, CLAIMS, measure=probed, derive=differences)
