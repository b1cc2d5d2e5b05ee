"""SupCon against cross-entropy on the handwritten digits: learning rates, then accuracy.

    python experiments/digits/run.py rates     # learning rates, on held-out training images
    python experiments/digits/run.py accuracy  # the chosen ones, on the test images

Both go on where they were stopped, and write their part of results.json beside this file.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from supcon_jax import config as configuration
from supcon_jax.data.sources import open_source
from supcon_jax.logs import read_metrics
from supcon_jax.report import circumstances
from supcon_jax.train import train_and_evaluate

HERE = Path(__file__).parent
RATES = {"supcon": (0.1, 0.2, 0.5, 1.0), "cross_entropy": (0.1, 0.3, 1.0, 3.0)}
SPLITS = {"stratified 80/20": ("train", "test"), "file order": ("first1437", "last360")}
METHODS = {  # name -> recipe, epochs of its first stage
    "SupCon": ("supcon", 90.0),
    "cross-entropy, equal passes": ("cross_entropy", 180.0),
    "cross-entropy, equal epochs": ("cross_entropy", 90.0),
}


def run(scratch: Path, recipe: str, seed: int, **fields) -> tuple[dict, list[dict]]:
    """Results and metrics of a run of the digits recipe with some fields changed."""
    config = configuration.load(f"digits:{recipe}")
    config.seed = seed
    config.checkpoint.every_epochs = 1e9
    config.update_from_flattened_dict(fields)
    workdir = scratch / configuration.config_hash(configuration.used(config))
    finished = workdir / "results.json"
    if not finished.exists():
        train_and_evaluate(config, workdir)
    return json.loads(finished.read_text()), read_metrics(workdir)


def learning_rates(scratch: Path, seeds: range) -> dict:
    """Accuracy on a fifth of the training images that was held out, for each learning rate."""
    table: dict = {}
    for recipe, rates in RATES.items():
        for rate in rates:
            found = []
            for seed in seeds:
                fields = {f"{recipe}.schedule.learning_rate": rate, "data.holdout": 0.2}
                fields["evaluation.every_epochs"] = 20.0
                try:
                    _, metrics = run(scratch, recipe, seed, **fields)
                except FloatingPointError as error:
                    print(error)
                    metrics = [{"heldout/top1": 0.0}]  # diverged
                found.append([m["heldout/top1"] for m in metrics if "heldout/top1" in m][-1])
            table.setdefault(recipe, {})[str(rate)] = spread(found)
            print(recipe, rate, table[recipe][str(rate)], flush=True)
    return table


def accuracies(scratch: Path, seeds: range) -> dict:
    """Test accuracy of each method on each split, beside k-NN on the pixels."""
    table: dict = {}
    for split, (train, test) in SPLITS.items():
        table[split] = {"k-NN on pixels": pixels(train, test)}
        for method, (recipe, epochs) in METHODS.items():
            fields = {f"{recipe}.epochs": epochs, f"{recipe}.warmup_epochs": epochs / 10}
            fields |= {"data.train_split": train, "data.test_split": test}
            runs = [run(scratch, recipe, seed, **fields)[0] for seed in seeds]
            table[split][method] = {
                "top1": spread([r["test"]["top1"] for r in runs]),
                "knn": spread([r["test"]["knn"] for r in runs]),
                "passes": runs[0]["stages"][recipe]["passes"],
                "training seconds": spread(
                    [sum(s["time/seconds"] for s in r["stages"].values()) for r in runs]
                ),
                "images/s": spread([r["stages"][recipe]["time/images_per_s"] for r in runs]),
            }
            print(split, method, table[split][method], flush=True)
    return table


def pixels(train: str, test: str) -> dict[str, float]:
    """Accuracy of scikit-learn's k-NN on the raw pixels."""

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        options = dict(name="", directory="", load_size=8, channels=1, memory_limit_gb=1.0)
        source = open_source("digits", split, **options)
        images, labels = source.load(np.arange(source.size))
        return images.reshape(source.size, -1).astype(np.float64), labels

    return {
        f"k={k}": round(float(KNeighborsClassifier(k).fit(*read(train)).score(*read(test))), 4)
        for k in (1, 3, 5)
    }


def spread(values: list[float]) -> dict:
    """The values with their mean and (n - 1) standard deviation."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "sd": round(float(np.std(values, ddof=1)), 4),
        "values": [round(float(v), 4) for v in values],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="SupCon against cross-entropy on the digits.")
    parser.add_argument("part", choices=("rates", "accuracy"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder of the runs (default: a new one)")
    options = parser.parse_args()
    scratch = options.scratch or Path(tempfile.mkdtemp())
    part = {"rates": learning_rates, "accuracy": accuracies}[options.part]
    table = part(scratch, range(options.seeds))
    file = HERE / "results.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    command = f"python experiments/digits/run.py {options.part} --seeds {options.seeds}"
    record[options.part] = {"command": command, "table": table, **circumstances()}
    file.write_text(json.dumps(record, indent=1) + "\n")
    if options.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
