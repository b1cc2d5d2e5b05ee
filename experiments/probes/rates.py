"""Learning rates of the SGD probe at the cpu scale: python -m experiments.probes.rates

The linear stage for two epochs of all training images but a tenth, without augmentation, on the
encoder of each method's run of seed 0: at the rate of the recipe, a third and three times that, and
on in either direction while the best on the held-out tenth is at an end. Writes rates.json.
"""

import argparse
import json
from pathlib import Path

from experiments.bases import LINEAR_RATES
from experiments.probes.run import PLAIN, by_sgd, opened, settings
from experiments.runner import trained, with_seed, workdir_of
from supcon_jax.command import keep_compiled_programs, quieten
from supcon_jax.report import circumstances

EPOCHS, HOLDOUT = 2.0, 0.1
FIRST, STEP = LINEAR_RATES["supcon"], 3.0


def search(workdir: Path) -> dict[str, float]:
    """Accuracies on held-out images, by learning rate."""
    subject = opened(workdir)
    config = subject.run.config
    config.data.holdout, config.evaluation.every_epochs = HOLDOUT, EPOCHS
    config.linear.update(epochs=EPOCHS, warmup_epochs=EPOCHS / 10)
    config.linear.augment.update(PLAIN)
    found: dict[int, float] = {}
    ahead = [-1, 0, 1]
    while ahead:
        for power in ahead:
            config.linear.schedule.learning_rate = FIRST * STEP**power
            found[power] = by_sgd(subject, f"rate {power}")["heldout"]
        best = max(found, key=found.__getitem__)
        ahead = [power for power in (best - 1, best + 1) if power not in found]
    return {f"{FIRST * STEP**power:.3g}": score for power, score in sorted(found.items())}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Learning rates of the SGD probe.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs/experiments/cpu"))
    options = parser.parse_args()
    quieten()
    keep_compiled_programs()
    table = {}
    for name, config in settings("cpu", options.data).items():
        trained(with_seed(config, 0), workdir_of(config, 0, options.scratch))
        table[name] = search(workdir_of(config, 0, options.scratch))
        print(name, table[name], flush=True)
    record = {"heldout": table, "command": "python -m experiments.probes.rates"}
    file = Path(__file__).with_name("rates.json")
    file.write_text(json.dumps(record | circumstances(), indent=1) + "\n")


if __name__ == "__main__":
    main()
