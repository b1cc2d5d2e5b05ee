"""The planned memory of a pre-training step beside what is really used.

    python experiments/scaling/memory.py --config cifar10_resnet18 --batch 32 --record

Compiles the step, notes the memory in use, makes a state and a batch of zeros and takes two steps;
the growth is up to the highest mark: on a GPU of its memory by the allocator's own count, else of
this process's resident memory (Linux). --record adds a line to memory.jsonl.
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from supcon_jax import config as configuration
from supcon_jax import plan, stages
from supcon_jax.report import circumstances


def resident(field: str) -> int:
    """Bytes: VmRSS is what there is now, VmHWM the most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def growth() -> Callable[[], int]:
    """Gives, whenever it is called, by how many bytes memory has grown from here to its peak."""
    device = jax.devices()[0]
    return growth_of_gpu(device) if device.platform == "gpu" else growth_of_process()


def growth_of_process() -> Callable[[], int]:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the compiler has left
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


def growth_of_gpu(device: jax.Device) -> Callable[[], int]:
    start = device.memory_stats()

    def grown() -> int:
        peak = device.memory_stats()["peak_bytes_in_use"]
        if peak <= start["peak_bytes_in_use"]:  # which nothing resets
            raise SystemExit(
                f"compiling used {peak} bytes, the steps not more: take a larger --batch"
            )
        return peak - start["bytes_in_use"]

    return grown


def zeros(shape: Any) -> jax.Array:
    is_key = jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jax.numpy.zeros(shape.shape, shape.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned memory beside the process's growth.")
    parser.add_argument("--config", default="digits")
    parser.add_argument("--batch", type=int, default=1024, help="images")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    config = configuration.load(options.config)
    config.supcon.batch_size = options.batch
    mesh = plan.make_mesh("")
    source = plan.stand_in(config, options.batch)
    stage = stages.build_stage(config, "supcon", stages.Data(*[source] * 4), mesh)
    shapes = (
        stages.abstract_state(config, "supcon", stage.model, stage.tx, mesh),
        plan.abstract_batch(config, "supcon", source, mesh),
    )
    planned = plan.plan_stage(config, "supcon", mesh).peak
    step = stage.train_step.lower(*shapes).compile()
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    make = jax.jit(lambda: jax.tree.map(zeros, shapes), out_shardings=placed).lower().compile()

    grown = growth()
    state, batch = make()
    for _ in range(2):
        state, _ = step(state, batch)
        jax.block_until_ready(state)
    record = {"config": options.config, "batch": options.batch, "planned": planned}
    record["grown"] = grown()
    record["command"] = f"memory.py --config {options.config} --batch {options.batch}"
    line = json.dumps(record | circumstances())
    if options.record:
        with Path(__file__).with_suffix(".jsonl").open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
