"""Step time and bytes on 1, 2, 4 and 8 simulated CPU devices, measured and modelled.

    python experiments/scaling/devices.py [--turns 9]

The pre-training step of configs/digits.py at its batch of 128 images in two views, split over the
devices; all of them share the cores of this machine, so that the work is the same and what grows is
the cost of having devices: smaller parts, meetings, copies. The counts take turns. Writes
devices.json and devices.md.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from supcon_jax import config as configuration
from supcon_jax import parallel, plan, stages
from supcon_jax.programs import Figures
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
COUNTS, STEPS = (1, 2, 4, 8), 20


def runner(count: int, exchange: str) -> tuple[Any, dict[str, float]]:
    """A function that takes so many steps, and the bytes that a device sends in one."""
    config = configuration.load("digits")
    config.supcon.objective.exchange = exchange
    mesh = parallel.make_mesh(jax.devices()[:count])
    data = stages.open_data(config)
    stage = stages.build_stage(config, "supcon", data, mesh)
    state = stages.create(stage, config, mesh, None)
    batch = next(stages.batches(stage, 0, config, data.train, mesh))
    found = plan.plan_stage(config, "supcon", mesh)
    assert isinstance(found.step, Figures)
    sent = sum(one.bytes for one in found.step.collectives)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = stage.train_step(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / STEPS

    return run, {"program": sent, "model": sum(found.model.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    cases = [(count, exchange) for exchange in ("gather", "ring") for count in COUNTS]
    made = {case: runner(*case) for case in cases if case != (1, "ring")}
    seconds: dict[Any, list[float]] = {case: [] for case in made}
    for turn in range(turns + 1):  # the first warms up
        for case, (run, _) in made.items():
            taken = run()
            seconds[case] += [taken] if turn else []
    results = []
    for case, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[1, "gather"], strict=True)]
        results.append(
            {
                "devices": case[0],
                "exchange": case[1],
                "milliseconds": round(1e3 * statistics.median(times), 2),
                "beside one device": round(statistics.median(ratios), 2),
                "smallest": round(min(ratios), 2),
                "largest": round(max(ratios), 2),
                "bytes, program": round(made[case][1]["program"]),
                "bytes, model": round(made[case][1]["model"]),
            }
        )
    record = {"command": "devices.py", "turns": turns, "results": results, **circumstances()}
    (HERE / "devices.json").write_text(json.dumps(record, indent=1) + "\n")
    names = list(results[0])
    lines = ["| " + " | ".join(names) + " |", "| ---: | --- |" + " ---: |" * (len(names) - 2)]
    for result in results:
        cells = [f"{x:,}" if isinstance(x, int) else str(x) for x in result.values()]
        lines += ["| " + " | ".join(cells) + " |"]
    (HERE / "devices.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
