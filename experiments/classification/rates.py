"""Learning rates of the cpu scale, for every method: python -m experiments.classification.rates

Each method with its rate times 0.3, 1 and 3, and on from there while the best is the smallest or
largest one; one seed, a fifth of the training images held out. Every experiment uses the rate that
is best on these for its methods; those of other optimizers and of the ViT were set by hand. The
rate of the linear stage is tried with a method of each recipe; the one that is best on
Fashion-MNIST is for both data sets. Goes on where it was stopped. Writes rates.json.
"""

import argparse
import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments.classification.run import DATA, methods
from experiments.runner import trained
from supcon_jax import config as configuration
from supcon_jax.command import keep_compiled_programs, quieten
from supcon_jax.logs import read_metrics
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
FACTORS = (0.3, 1.0, 3.0)
MOST = 7  # factors that are tried
LINEAR = {  # whose linear stage stands for that of a recipe
    "SupCon": "supcon",
    "SimCLR": "simclr",
    "cross-entropy, two stages": "cross_entropy",
}


def heldout(config: ConfigDict, stage: str, factor: float, scratch: Path) -> tuple[float, float]:
    """The learning rate of a stage, and the accuracy on held-out images at the end of the run."""
    config = config.copy_and_resolve_references()
    config.data.holdout = 0.2
    config.evaluation.every_epochs = config[config.stages[-1]].epochs
    schedule = config[stage].schedule
    schedule.learning_rate = factor * schedule.learning_rate
    workdir = scratch / configuration.config_hash(configuration.used(config))
    try:
        trained(config, workdir)
    except FloatingPointError:
        return schedule.learning_rate, 0.0
    found = [m["heldout/top1"] for m in read_metrics(workdir) if "heldout/top1" in m]
    return schedule.learning_rate, found[-1]


def search(config: ConfigDict, stage: str, scratch: Path) -> dict[str, float]:
    """Accuracies on held-out images, by learning rate."""
    found: dict[float, tuple[float, float]] = {}  # factor -> rate and accuracy
    tried = list(FACTORS)
    while tried and len(found) < MOST:
        found |= {factor: heldout(config, stage, factor, scratch) for factor in tried}
        best = max(found, key=lambda factor: found[factor][1])
        tried = [best * 0.3] * (best == min(found)) + [best * 3] * (best == max(found))
    return {f"{rate:.3g}": score for _, (rate, score) in sorted(found.items())}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Learning rates of the cpu scale.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs/experiments/rates"))
    parser.add_argument("--only", nargs="+", help="methods; what is known of others is kept (all)")
    options = parser.parse_args()
    quieten()
    keep_compiled_programs()
    file = HERE / "rates.json"
    table: dict[str, dict[str, dict[str, float]]] = {}
    if options.only:
        table = json.loads(file.read_text())["heldout"]
    for name in DATA["cpu"]:
        configs = methods("cpu", options.data, name, chosen=False)
        tried = {method: (config, config.stages[0]) for method, config in configs.items()}
        tried |= {f"{method}, linear stage": (configs[method], "linear") for method in LINEAR}
        for method in options.only or tried:
            config, stage = tried[method]
            table.setdefault(name, {})[method] = search(config, stage, options.scratch)
            print(name, method, table[name][method], flush=True)
    record = {"heldout": table, "command": "python -m experiments.classification.rates"}
    file.write_text(json.dumps(record | circumstances(), indent=1) + "\n")


if __name__ == "__main__":
    main()
