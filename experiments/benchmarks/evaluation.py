"""Time and memory of the evaluation of cached features, beside scikit-learn.

    python experiments/benchmarks/evaluation.py

50,000 training and 10,000 test features of 512 dimensions, float32, from a mixture of one Gaussian
a class: the variances fall as 1 / i along random axes, the means are drawn with the same variances
times a factor, and all is moved away from zero. The factor is chosen so that a linear classifier is
right for about 90 % of the test features. Not features of an encoder, but as correlated and as hard
as some. For the k-NN with 1,000 classes each of the 10 is split into 100 at random; what is scored
is which of the 10 the answer belongs to.

Every turn of a contestant is a process of its own: it makes the features, runs once, which compiles
and gives the memory (peak of the resident set over what it was before, the features being there),
and once more for the time; scikit-learn, which compiles nothing, only once. Beside the seconds on
the clock are those of the cores: what others run on the machine lengthens the first far more, and
the load average says how much that was. scikit-learn's logistic regression has its usual tolerance
and as many steps as it needs. Writes evaluation.json and evaluation.md beside this file.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__)
TRAIN, TEST, DIM, CLASSES = 50_000, 10_000, 512, 10
FACTOR = 0.0185  # of the variance of the means
L2 = 1e-5


class Features(NamedTuple):
    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    expected: np.ndarray


def mixture() -> Features:
    random = np.random.default_rng(0)
    spread = np.arange(1, DIM + 1) ** -0.5
    axes, _ = np.linalg.qr(random.standard_normal((DIM, DIM)))
    means = random.standard_normal((CLASSES, DIM)) * spread * FACTOR**0.5
    labels = random.integers(CLASSES, size=TRAIN + TEST).astype(np.int32)
    rows = random.standard_normal((len(labels), DIM), np.float32) * np.float32(spread)
    rows = (rows + np.float32(means)[labels]) @ np.float32(axes)
    rows += np.float32(random.uniform(0, 1, DIM))
    return Features(rows[:TRAIN], labels[:TRAIN], rows[TRAIN:], labels[TRAIN:])


Result = dict[str, Any]


def accuracy(predicted: np.ndarray, found: Features) -> Result:
    return {"accuracy": round(float((predicted == found.expected).mean()), 4)}


def our_knn(found: Features) -> Result:
    from supcon_jax.evaluation.knn import knn_predict

    return accuracy(knn_predict(found.test, found.train, found.labels), found)


def our_knn_of_many(found: Features) -> Result:
    from supcon_jax.evaluation.knn import knn_predict

    sorts = found.labels * 100 + np.arange(TRAIN, dtype=np.int32) % 100
    predicted = knn_predict(found.test, found.train, sorts, neighbours=200)
    return accuracy(predicted // 100, found)


def sklearn_knn(found: Features) -> Result:
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((distances.min(axis=1, keepdims=True) - distances) / 0.07)

    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    return accuracy(model.fit(found.train, found.labels).predict(found.test), found)


def our_sweep(found: Features) -> Result:
    from supcon_jax.evaluation.probe import predict_logits, sweep_probe

    sweep = sweep_probe(found.train, found.labels, classes=CLASSES)
    score = accuracy(predict_logits(sweep.probe, found.test).argmax(-1), found)
    heldout = {f"{l2:g}": round(value, 4) for l2, value in sweep.accuracies.items()}
    return score | {"l2": sweep.l2, "held-out accuracy": heldout}


def our_probe(found: Features) -> Result:
    from supcon_jax.evaluation.probe import fit_probe, predict_logits

    probe = fit_probe(found.train, found.labels, classes=CLASSES, l2=L2)
    score = accuracy(predict_logits(probe, found.test).argmax(-1), found)
    return score | {"objective": objective(*probe, found)}


def sklearn_probe(found: Features) -> Result:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (L2 * TRAIN), max_iter=10_000).fit(found.train, found.labels)
    value = objective(model.coef_.T, model.intercept_, found)
    return accuracy(model.predict(found.test), found) | {"objective": value}


def objective(kernel: np.ndarray, bias: np.ndarray, found: Features) -> float:
    """In float64, a thousand rows at a time."""
    from scipy.special import log_softmax

    own = 0.0
    for rows, ids in zip(np.split(found.train, 50), np.split(found.labels, 50), strict=True):
        logits = rows.astype(float) @ kernel + bias
        own += log_softmax(logits, axis=1)[np.arange(len(ids)), ids].sum()
    return round(float(-own / TRAIN + L2 / 2 * np.square(kernel.astype(float)).sum()), 8)


CONTESTANTS: dict[str, Callable[[Features], Result]] = {
    "k-NN, k = 20, 10 classes": our_knn,
    "k-NN, k = 200, 1,000 classes": our_knn_of_many,
    "k-NN, k = 20, scikit-learn": sklearn_knn,
    "probe, sweep of 9 penalties": our_sweep,
    f"probe, l2 = {L2:g}": our_probe,
    f"probe, l2 = {L2:g}, scikit-learn": sklearn_probe,
}


def resident(field: str) -> float:
    """MiB, as /proc counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def contestant(name: str) -> None:
    """The child: two runs, one line of JSON."""
    import jax.numpy as jnp
    import scipy.optimize  # noqa: F401
    import sklearn.linear_model
    import sklearn.neighbors  # noqa: F401

    found = mixture()
    jnp.zeros(3).block_until_ready()  # what is loaded once is not counted
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, times = resident("VmRSS"), []
    for _ in range(1 if "scikit-learn" in name else 2):
        start, of_cores = time.perf_counter(), time.process_time()
        result = CONTESTANTS[name](found)
        times.append((time.perf_counter() - start, time.process_time() - of_cores))
        peak = resident("VmHWM")
    numbers = {
        "first": round(times[0][0], 3),
        "seconds": round(times[-1][0], 3),
        "core seconds": round(times[-1][1], 3),
        "extra MiB": round(peak - before),
        "load": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(numbers | {"result": result}))


def measure(turns: int) -> dict[str, Any]:
    answers: dict[str, list[Any]] = {name: [] for name in CONTESTANTS}
    for turn in range(turns):
        for name, of_turns in answers.items():
            command = [sys.executable, str(HERE), "--contestant", name]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            of_turns.append(json.loads(child.stdout.splitlines()[-1]))
            print(f"turn {turn + 1} of {turns}, {name}: {of_turns[-1]}", flush=True)
    return {
        name: {
            "seconds, median": statistics.median(x["seconds"] for x in of_turns),
            "seconds with compilation, median": statistics.median(x["first"] for x in of_turns),
            "core seconds, median": statistics.median(x["core seconds"] for x in of_turns),
            "extra MiB, median": statistics.median(x["extra MiB"] for x in of_turns),
            "seconds, all turns": [x["seconds"] for x in of_turns],
            "load average, all turns": [x["load"] for x in of_turns],
            **of_turns[-1]["result"],
        }
        for name, of_turns in answers.items()
    }


def table(record: dict[str, Any]) -> str:
    loads = [x for r in record["results"].values() for x in r["load average, all turns"]]
    lines = [
        f"{TEST:,} test features, {TRAIN:,} training features, {DIM} dimensions, "
        f"{record['hardware']['cores']} cores; medians of the turns of `{record['command']}`. The "
        f"load average was {min(loads):.1f} to {max(loads):.1f}, that of the run itself included.",
        "",
        "| | seconds | core seconds | with compilation, seconds | extra MiB | test accuracy "
        "| objective |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, result in record["results"].items():
        cells = [
            f"{result['seconds, median']:.1f}",
            f"{result['core seconds, median']:.1f}",
            f"{result['seconds with compilation, median']:.1f}",
            f"{result['extra MiB, median']:,.0f}",
            f"{result['accuracy']:.2%}",
            f"{result['objective']:.7f}" if "objective" in result else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of k-NN and linear probe.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contestant", help="for the processes that this one starts")
    options = parser.parse_args()
    if options.contestant:
        contestant(options.contestant)
        return
    results = measure(options.turns)
    from supcon_jax.report import circumstances

    record = {
        "command": f"evaluation.py --turns {options.turns}",
        "results": results,
        "peers": {"scikit-learn": importlib.metadata.version("scikit-learn")},
        **circumstances(),
    }
    HERE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
