"""The SGD probe of the cpu scale at greater lengths: python -m experiments.probes.lengths

The linear stage on all training images, as run.py has it with the recipe's augmentation, for 18 and
54 epochs instead of six, on the same encoders. Writes lengths.json.
"""

import argparse
from pathlib import Path

from experiments.probes.run import by_sgd, opened, settings
from experiments.runner import summary, trained, with_seed, workdir_of
from supcon_jax.command import keep_compiled_programs, quieten
from supcon_jax.report import circumstances
from supcon_jax.workdir import write_json

LENGTHS, SEEDS = (18.0, 54.0), 3


def top1(workdir: Path, epochs: float) -> float:
    """Test top-1 of the probe on one encoder, in per cent."""
    subject = opened(workdir)
    subject.run.config.linear.update(epochs=epochs, warmup_epochs=epochs / 10)
    return 100 * by_sgd(subject, f"{epochs:g} epochs")["top1"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The SGD probe at greater lengths.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs/experiments/cpu"))
    options = parser.parse_args()
    quieten()
    keep_compiled_programs()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(SEEDS):
        for name, config in settings("cpu", options.data).items():
            workdir = workdir_of(config, seed, options.scratch)
            trained(with_seed(config, seed), workdir)
            rows.setdefault(name, []).append(
                {f"{epochs:g} epochs": top1(workdir, epochs) for epochs in LENGTHS}
            )
            print(name, seed, rows[name][-1], flush=True)
    record = summary(rows) | {"command": "python -m experiments.probes.lengths"}
    write_json(Path(__file__).with_name("lengths.json"), record | circumstances())


if __name__ == "__main__":
    main()
