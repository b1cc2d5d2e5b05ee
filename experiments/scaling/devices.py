"""Step time and bytes on 1, 2, 4 and 8 simulated CPU devices, measured and modelled.

    python experiments/scaling/devices.py [--turns 9]

The pre-training step of configs/digits.py at its batch of 128 images in two views, split over the
devices; all of them share the cores of this machine, so that the work is the same and what grows is
the cost of having devices: smaller parts, meetings, copies. The model of n devices is n steps of
one device with 1/n of the batch, one after another, and the step's collectives alone, each as an
all-reduce of its size; both are measured in the same turns. Writes devices.json and devices.md.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax import parallel, plan, stages
from supcon_jax.parallel import AXIS
from supcon_jax.programs import Collective, Figures
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
COUNTS, STEPS = (1, 2, 4, 8), 20
TIMED = ("step", "part", "meetings")
Run = Callable[[], float]  # seconds a step
Case = tuple[int, str]  # devices, exchange


def recipe(exchange: str, part: int = 1) -> ConfigDict:
    """The digits, with a part of their batch."""
    config = configuration.load("digits")
    config.supcon.batch_size //= part
    config.supcon.objective.exchange = exchange
    return config


def steps(config: ConfigDict, mesh: Mesh) -> Run:
    """A function that takes training steps."""
    data = stages.open_data(config)
    stage = stages.build_stage(config, "supcon", data, mesh)
    state = stages.create(stage, config, mesh, None)
    batch = next(stages.batches(stage, 0, config, data.train, mesh))

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = stage.train_step(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / STEPS

    return run


def meetings(collectives: Sequence[Collective], mesh: Mesh) -> Run:
    """A function that sends what a step sends, and computes nothing."""
    share = 2 * (mesh.size - 1) / mesh.size * 4  # bytes that a number of an all-reduce costs
    sizes = [
        max(round(one.bytes / one.times / share), 1)
        for one in collectives
        for _ in range(one.times)
    ]

    def sums(numbers: list[jax.Array]) -> list[jax.Array]:
        found, token = [], jnp.zeros(())
        for number in numbers:  # each waits for the one before
            mean = jax.lax.pmean(number + token, AXIS)
            token = 0 * mean[0]
            found.append(mean)
        return found

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    program, numbers = jax.jit(mapped), [jnp.ones(size) for size in sizes]

    def run() -> float:
        nonlocal numbers
        start = time.perf_counter()
        for _ in range(STEPS):
            numbers = program(numbers)
        jax.block_until_ready(numbers)
        return (time.perf_counter() - start) / STEPS

    return run


def runs(case: Case) -> tuple[dict[str, Run], dict[str, int]]:
    """What a case is timed by, and the bytes that a device sends in a step."""
    count, exchange = case
    mesh, one = (parallel.make_mesh(jax.devices()[:n]) for n in (count, 1))
    found = plan.plan_stage(recipe(exchange), "supcon", mesh)
    assert isinstance(found.step, Figures)
    timed = {"step": steps(recipe(exchange), mesh)}
    if count > 1:
        timed["part"] = steps(recipe(exchange, count), one)
        timed["meetings"] = meetings(found.step.collectives, mesh)
    sent = sum(one.bytes for one in found.step.collectives)
    return timed, {"program": round(sent), "model": round(sum(found.model.values()))}


def ratios(case: Case, turns: Sequence[Mapping[Any, float]]) -> dict[str, list[float]]:
    """The step's time and its model beside one device's step, of every turn."""
    count, found = case[0], {"measured": [], "model": []}
    for times in turns:
        alone = times[(1, "gather"), "step"]
        found["measured"].append(times[case, "step"] / alone)
        model = alone
        if count > 1:
            model = count * times[case, "part"] + times[case, "meetings"]
        found["model"].append(model / alone)
    return found


def spread(values: Sequence[float]) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    number = parser.parse_args().turns
    cases = [(count, exchange) for exchange in ("gather", "ring") for count in COUNTS]
    made = {case: runs(case) for case in cases if case != (1, "ring")}
    timed = {(case, name): run for case, (of, _) in made.items() for name, run in of.items()}
    turns = [{key: run() for key, run in timed.items()} for _ in range(number + 1)]
    del turns[0]  # it warms up
    results = []
    for case, (of, sent) in made.items():
        found = ratios(case, turns)
        medians = {
            f"{name}, ms": round(1e3 * statistics.median(times[case, name] for times in turns), 2)
            for name in of
        }
        results.append(
            {
                "devices": case[0],
                "exchange": case[1],
                **{f"{name}, ms": medians.get(f"{name}, ms") for name in TIMED},
                "measured beside one device": spread(found["measured"]),
                "model beside one device": spread(found["model"]),
                "bytes, program": sent["program"],
                "bytes, model": sent["model"],
            }
        )
    record = {"command": "devices.py", "turns": number, "results": results, **circumstances()}
    (HERE / "devices.json").write_text(json.dumps(record, indent=1) + "\n")
    names = list(results[0])
    lines = ["| " + " | ".join(names) + " |", "| ---: | --- |" + " ---: |" * (len(names) - 2)]
    for result in results:
        cells = ["-" if x is None else f"{x:,}" if isinstance(x, int) else str(x)
                 for x in result.values()]  # fmt: skip
        lines += ["| " + " | ".join(cells) + " |"]
    (HERE / "devices.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
