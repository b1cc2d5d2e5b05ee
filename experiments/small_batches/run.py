"""Small batches: alone, beside a queue, and as parts of a large one, at equal passes of images.

    python experiments/small_batches/run.py --cifar10 DIR [--seeds 0 1 2] [--scratch DIR]

The folder is DIR/SPLIT/CLASS/IMAGE. A run that is finished in the scratch folder is not run again.
Writes results.json and the table of README.md beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from supcon_jax.logs import read_metrics
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
HELD = 64  # images whose activations are held at once, in every setting
LARGE = 512
IMAGES, TRAINED = 49_000, 38_400  # of the training part; in all, in two views each
RATE = 0.5 / 1024  # learning rate over batch, that of configs/cifar10.py
SETTINGS = {
    "plain": {"batch_size": HELD},
    "queue": {
        "batch_size": HELD,
        "queue.size": 4096,
        "queue.momentum": 0.99,
        "queue.from_epoch": 0.1,
        "objective.contrast_mode": "one",
    },
    "cache": {"batch_size": LARGE, "micro_batches": LARGE // HELD},
    "large": {"batch_size": LARGE},
}


def command(setting: str, seed: int, folder: str, workdir: Path) -> list[str]:
    of_stage = SETTINGS[setting]
    steps = TRAINED // of_stage["batch_size"]
    steps_per_epoch = IMAGES // of_stage["batch_size"]
    stage = {
        **of_stage,
        "epochs": steps / steps_per_epoch,
        "warmup_epochs": 0.1,
        "schedule.learning_rate": RATE * of_stage["batch_size"],
        "schedule.warmup_start": 0.0,
    }
    fields = {
        "seed": seed,
        "stages": "('supcon',)",
        "data.source": "folder",
        "data.dir": folder,
        "model.width": 0.25,
        "log.every_steps": TRAINED // 10 // of_stage["batch_size"],
        "evaluation.every_epochs": 0.26,
        "evaluation.references": 10_000,
        "checkpoint.every_epochs": 100.0,
        **{f"supcon.{name}": value for name, value in stage.items()},
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    run = [sys.executable, "-m", "supcon_jax.train", "--config", "cifar10_resnet18", "--workdir"]
    return [*run, str(workdir), *flags]


def summary(workdirs: list[Path]) -> dict[str, object]:
    found = [json.loads((workdir / "results.json").read_text()) for workdir in workdirs]
    records = [read_metrics(workdir) for workdir in workdirs]
    return {
        "test k-NN": [results["test"]["knn"] for results in found],
        "held-out k-NN on the way": [
            {r["step"]: r["heldout/knn"] for r in metrics if "heldout/knn" in r}
            for metrics in records
        ],
        "steps": found[0]["stages"]["supcon"]["steps"],
        "commit": [json.loads((w / "config.json").read_text())["commit"] for w in workdirs],
    }


def table(results: dict[str, dict]) -> str:
    lines = [
        "| setting | batch | steps | test k-NN |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found in results.items():
        scores = [100 * score for score in found["test k-NN"]]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        lines.append(
            f"| {name} | {SETTINGS[name]['batch_size']} | {found['steps']} "
            f"| {statistics.mean(scores):.1f}{spread} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", required=True, help="folder of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("runs/small_batches"))
    options = parser.parse_args()
    for seed in options.seeds:  # settings take turns
        for setting in SETTINGS:
            workdir = options.scratch / f"{setting}-{seed}"
            if not (workdir / "results.json").exists():
                subprocess.run(command(setting, seed, options.cifar10, workdir), check=True)
    results = {
        setting: summary([options.scratch / f"{setting}-{seed}" for seed in options.seeds])
        for setting in SETTINGS
    }
    record = {
        "command": "run.py --cifar10 DIR --seeds " + " ".join(map(str, options.seeds)),
        "seeds": options.seeds,
        "results": results,
        **circumstances(),
        "commit": "see each run",
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    start, end = text.index("| setting"), text.rindex("|\n") + 2
    readme.write_text(text[:start] + table(results) + "\n" + text[end:])
    print(table(results))


if __name__ == "__main__":
    main()
