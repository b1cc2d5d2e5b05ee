"""How much of a run's wall time goes to anything but the compiled training step?

    python experiments/benchmarks/stalls.py [--cifar10 DIR] [--turns 5]

Trains the first stage of configs/digits.py (whole) and, where its folder is given, of
configs/cifar10_resnet18.py at a quarter of the width (60 steps), as the command does it: input,
checkpoints, logs, looks at the held-out images. The wall time runs from the end of the first step,
which compiles, to the end of the loop, without the looks, which are evaluation. The compiled step's
time is what the same steps take in a bare loop on batches that are on the device already, right
after, in the same process. The share is 1 - bare / wall, so that whatever the step hides (input is
prepared beside it) does not count, and a step that is slowed by it does. Writes stalls.json and
stalls.md.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from supcon_jax import config as configuration
from supcon_jax import parallel, stages, train
from supcon_jax.logs import Recorder
from supcon_jax.report import circumstances

HERE = Path(__file__).parent


def digits(_: str) -> Any:
    config = configuration.load("digits")
    config.stages = ("supcon",)
    return config


def cifar10(folder: str) -> Any:
    config = configuration.load("cifar10_resnet18")
    config.stages = ("supcon",)
    config.data.update(source="folder", dir=folder)
    config.model.width = 0.25
    config.supcon.update(batch_size=128, epochs=60 / (49_000 // 128), warmup_epochs=0.0)
    config.evaluation.update(references=2000, every_epochs=30 / (49_000 // 128))
    config.checkpoint.every_epochs = 30 / (49_000 // 128)
    return config


class Clock:
    """When the loop's first step was done and its last, and how long the looks took."""

    def __init__(self) -> None:
        self.start = self.looks = self.end = 0.0
        self._add, self._look, self._close = Recorder.add, train.heldout_scores, Recorder.close

    def __enter__(self) -> "Clock":
        def add(recorder: Recorder, step: int, metrics: Any) -> None:
            self._add(recorder, step, metrics)
            if not self.start:
                jax.block_until_ready(metrics)
                self.start = time.perf_counter()

        def look(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            found = self._look(*arguments, **options)
            self.looks += (time.perf_counter() - begin) if self.start else 0.0
            return found

        def close(recorder: Recorder) -> None:
            self.end = time.perf_counter()
            self._close(recorder)

        Recorder.add, train.heldout_scores, Recorder.close = add, look, close
        return self

    def __exit__(self, *_: object) -> None:
        Recorder.add, train.heldout_scores = self._add, self._look
        Recorder.close = self._close

    @property
    def wall(self) -> float:
        return self.end - self.start - self.looks


def bare(config: Any, steps: int) -> float:
    """Seconds of so many steps and nothing else."""
    mesh, data = parallel.make_mesh(), stages.open_data(config)
    stage = stages.build_stage(config, "supcon", data, mesh)
    state = stages.create(stage, config, mesh, None)
    made = stages.batches(stage, 0, config, data.train, mesh)
    ready = list(itertools.islice(made, min(8, stage.steps)))
    state, metrics = stage.train_step(state, ready[0])
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for step in range(steps):
        state, metrics = stage.train_step(state, ready[step % len(ready)])
    jax.block_until_ready(metrics)
    return time.perf_counter() - start


def measure(config: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as workdir, Clock() as clock:
        results = train.train_and_evaluate(config, workdir)
    steps = results["stages"]["supcon"]["steps"] - 1
    alone = bare(config, steps)
    share = 1 - alone / clock.wall
    return {"steps": steps, "wall": clock.wall, "bare": alone, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", default="", help="folder of the images")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    recipes = {"digits": digits} | ({"cifar10_resnet18": cifar10} if options.cifar10 else {})
    results: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    for _ in range(options.turns):
        for name, make in recipes.items():
            results[name].append(measure(make(options.cifar10)))
            print(name, results[name][-1], flush=True)
    lines = [
        "| recipe | steps | wall s | bare steps s | share of other things |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results.items():
        median = {key: statistics.median(one[key] for one in found) for key in found[0]}
        shares = [100 * one["share"] for one in found]
        lines.append(
            f"| {name} | {median['steps']:.0f} | {median['wall']:.1f} | {median['bare']:.1f} "
            f"| {100 * median['share']:.1f} % ({min(shares):.1f} to {max(shares):.1f}) |"
        )
    record = {"command": "stalls.py --cifar10 DIR", "results": results, **circumstances()}
    (HERE / "stalls.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "stalls.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
