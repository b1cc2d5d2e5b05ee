"""Does SupCon learn through each policy? 200 steps of ResNet-18 at width 0.25, each in one command.

    python experiments/policies/run.py --cifar10 DIR --tiny_imagenet32 DIR [--scratch DIR]

The folders are DIR/SPLIT/CLASS/IMAGE. A run that is finished in the scratch folder is not run
again. Writes results.json and the table of README.md beside this file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from supcon_jax.logs import read_metrics
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
STEPS, BATCH = 200, 128
POLICIES = {
    "crop_flip": [],
    "sim_augment": ["blur=0.5"],
    "auto_augment": ["table=cifar"],
    "rand_augment": ["layers=2", "magnitude=5.0"],
    "stacked_rand_augment": ["layers=2", "magnitude=5.0", "blur=0.5"],
}
IMAGES = {"cifar10": 49_000, "tiny_imagenet32": 98_000}  # of the training part, 2 % held out
FILES = {"cifar10": "cifar10_resnet18", "tiny_imagenet32": "tiny_imagenet32"}


def command(data: str, folder: str, policy: str, workdir: Path) -> list[str]:
    fields = {
        "stages": "('supcon',)",
        "data.source": "folder",
        "data.dir": folder,
        "model.width": "0.25",
        "supcon.batch_size": BATCH,
        "supcon.epochs": STEPS / (IMAGES[data] // BATCH),
        "supcon.warmup_epochs": 20 / (IMAGES[data] // BATCH),
        "supcon.schedule.learning_rate": "0.1",
        "supcon.schedule.warmup_start": "0.0",
        "supcon.augment.name": policy,
        "evaluation.every_epochs": STEPS / (IMAGES[data] // BATCH),
        "evaluation.references": 5000,
        "checkpoint.every_epochs": "100.0",
        **{f"supcon.augment.{s.partition('=')[0]}": s.partition("=")[2] for s in POLICIES[policy]},
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    run = [sys.executable, "-m", "supcon_jax.train", "--config", FILES[data], "--workdir"]
    return [*run, str(workdir), *flags]


def summary(workdir: Path) -> dict[str, float]:
    records = read_metrics(workdir)
    measured = [r for r in records if "excess" in r]
    excess = [r["excess"] for r in measured]
    # Few positives of many classes: the floor, loss - excess, moves from batch to batch.
    shares = [r["excess"] / (r["collapsed"] - r["loss"] + r["excess"]) for r in measured]
    knn = [r["heldout/knn"] for r in records if "heldout/knn" in r]
    return {
        "excess, step 20": excess[0],
        "excess, mean of steps 160 to 200": sum(excess[-3:]) / 3,
        "share of a collapsed encoder's, step 20": shares[0],
        "share, mean of steps 160 to 200": sum(shares[-3:]) / 3,
        "held-out k-NN before": knn[0],
        "held-out k-NN after": knn[-1],
    }


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| data set, policy | excess at step 20 | excess, steps 160 to 200 "
        "| share at step 20 | share, steps 160 to 200 | k-NN before | k-NN after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results.items():
        first, last, *shares = found.values()
        percents = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {name} | {first:.3f} | {last:.3f} | {percents} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for data in FILES:
        parser.add_argument(f"--{data}", required=True, help="folder of the images")
    parser.add_argument("--scratch", type=Path, default=Path("runs/policies"))
    options = parser.parse_args()
    results, commits = {}, {}
    for data in FILES:
        for policy in POLICIES:
            workdir = options.scratch / f"{data}-{policy}"
            if not (workdir / "results.json").exists():
                folder = getattr(options, data)
                subprocess.run(command(data, folder, policy, workdir), check=True)
            results[f"{data}, {policy}"] = summary(workdir)
            commits[f"{data}, {policy}"] = json.loads((workdir / "config.json").read_text())[
                "commit"
            ]
            print(table(results), flush=True)
    record = {
        "command": "run.py --cifar10 DIR --tiny_imagenet32 DIR",
        "steps": STEPS,
        "batch": BATCH,
        "seed": 0,
        "results": results,
        **circumstances(),
        "commit": commits,
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    start, end = text.index("| data set"), text.rindex("|\n") + 2
    readme.write_text(text[:start] + table(results) + "\n" + text[end:])


if __name__ == "__main__":
    main()
