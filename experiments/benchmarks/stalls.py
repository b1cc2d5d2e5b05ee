"""How much of a run's wall time goes to anything but the compiled training step?

    python experiments/benchmarks/stalls.py [--cifar10 DIR] [--turns 5]

Trains the first stage of configs/digits.py (whole) and, where its folder is given, of
configs/cifar10_resnet18.py at a quarter of the width (60 steps), as the command does it: input,
checkpoints, logs, looks at the held-out images. JAX's profiler records when compiled programs are
running on the CPU. The wall time runs from the end of the first step, which compiles, to the end of
the loop, without the looks, which are evaluation; the share is the part of it in which no program
is running. What other work slows a running step by is not in it. Writes stalls.json and stalls.md.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from supcon_jax import config as configuration
from supcon_jax import train
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
    """Marks in the trace: when the loop's first step was done, its looks, and its last step."""

    def __init__(self, folder: str) -> None:
        self.folder, self.started = folder, False
        self._add, self._look, self._close = Recorder.add, train.heldout_scores, Recorder.close

    def __enter__(self) -> "Clock":
        def add(recorder: Recorder, step: int, metrics: Any) -> None:
            self._add(recorder, step, metrics)
            if not self.started:
                self.started = True
                jax.block_until_ready(metrics)
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level, options.host_tracer_level = 0, 1
                jax.profiler.start_trace(self.folder, profiler_options=options)
                mark("begin")

        def look(*arguments: Any, **options: Any) -> Any:
            with jax.profiler.TraceAnnotation("mark look"):
                return self._look(*arguments, **options)

        def close(recorder: Recorder) -> None:
            mark("end")
            jax.profiler.stop_trace()
            self._close(recorder)

        Recorder.add, train.heldout_scores, Recorder.close = add, look, close
        return self

    def __exit__(self, *_: object) -> None:
        Recorder.add, train.heldout_scores = self._add, self._look
        Recorder.close = self._close


def mark(name: str) -> None:
    with jax.profiler.TraceAnnotation(f"mark {name}"):
        time.sleep(1e-3)


def shares(folder: str) -> dict[str, float]:
    """Seconds of the loop without its looks, and those of them in which a program is running."""
    (file,) = Path(folder).rglob("*.xplane.pb")
    found: dict[str, list[tuple[float, float]]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                name = "run" if "wait for completion" in event.name else event.name
                if name == "run" or name.startswith("mark "):
                    end = event.start_ns + event.duration_ns
                    found.setdefault(name, []).append((event.start_ns / 1e9, end / 1e9))
    begin, end = found["mark begin"][0][1], found["mark end"][0][0]
    looks = found.get("mark look", [])
    runs = [(a, b) for a, b in found["run"] if not any(c <= a and b <= d for c, d in looks)]
    wall = end - begin - sum(b - a for a, b in looks)
    running = covered(runs, begin, end)
    return {"wall": wall, "running": running, "share": 1 - running / wall}


def covered(intervals: list[tuple[float, float]], begin: float, end: float) -> float:
    """Length of the union of intervals, between two ends."""
    total, reached = 0.0, begin
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, end)
        total += max(0.0, stop - start)
        reached = max(reached, stop)
    return total


def measure(config: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as workdir, tempfile.TemporaryDirectory() as folder:
        with Clock(folder):
            results = train.train_and_evaluate(config, workdir)
        return {"steps": results["stages"]["supcon"]["steps"] - 1, **shares(folder)}


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
        "| recipe | steps | wall s | a program runs s | share of other things |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results.items():
        median = {key: statistics.median(one[key] for one in found) for key in found[0]}
        each = [100 * one["share"] for one in found]
        lines.append(
            f"| {name} | {median['steps']:.0f} | {median['wall']:.1f} | {median['running']:.1f} "
            f"| {100 * median['share']:.1f} % ({min(each):.1f} to {max(each):.1f}) |"
        )
    record = {"command": "stalls.py --cifar10 DIR", "results": results, **circumstances()}
    (HERE / "stalls.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "stalls.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
