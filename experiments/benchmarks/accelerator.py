"""The loss on an accelerator: dense and in blocks of several sizes, float32 and bfloat16 features.

    python experiments/benchmarks/accelerator.py

Forward and backward, D = 128, 100 classes, N = 2,048 to 262,144 rows, beside the floor: three
matrix products of 2 N^2 D operations at the rate of a square product of the same type and precision
on this device. A form ends where the compiler asks for more memory than the device has, or where a
step takes longer than --longest. Writes KIND.json and KIND.md, named after the device, beside this
file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from supcon_jax import l2_normalize, supcon_loss
from supcon_jax.report import circumstances

DIM, CLASSES = 128, 100
FORMS = {"dense": None, "blocks of 1024": 1024, "blocks of 4096": 4096, "blocks of 16384": 16384}
HERE = Path(__file__).parent


def median_seconds(step: Callable[[], Any], turns: int) -> float:
    seconds = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def matmul_rate(dtype: str, side: int, turns: int) -> float:
    """Operations a second of a square product, as the losses multiply."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(
        lambda x: jnp.matmul(x, x, precision=precision, preferred_element_type=jnp.float32)
    )
    return 2 * side**3 / median_seconds(lambda: product(x), turns)


def measure(rows: int, dtype: str, form: str, turns: int, limit: float) -> dict[str, Any] | None:
    """Seconds and temporary memory of a step, or None where it does not fit."""
    features = l2_normalize(jax.random.normal(jax.random.key(0), (rows, DIM))).astype(dtype)
    labels = jax.random.randint(jax.random.key(1), (rows,), 0, CLASSES)

    def loss(features: jax.Array) -> jax.Array:
        return supcon_loss(features, labels, block_size=FORMS[form]).mean()

    try:
        compiled = jax.jit(jax.value_and_grad(loss)).lower(features).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        if memory > limit:
            return None
        seconds = median_seconds(lambda: compiled(features), turns)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return {"rows": rows, "dtype": dtype, "form": form, "seconds": seconds, "temporary": memory}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| rows | features | form | seconds | times the floor | temporary MiB |"]
    lines += ["| ---: | --- | --- | ---: | ---: | ---: |"]
    for one in results:
        cells = f"{one['seconds']:.4g} | {one['times the floor']:.2f}"
        memory = f"{one['temporary'] / 2**20:,.0f}"
        start = f"{one['rows']:,} | {one['dtype']} | {one['form']}"
        lines += [f"| {start} | {cells} | {memory} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The loss on an accelerator, beside its floor.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048 * 2**k for k in range(8)])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--side", type=int, default=8192, help="of the square product")
    parser.add_argument("--longest", type=float, default=5, help="seconds a step may take")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    device = jax.devices()[0]
    limit = 0.9 * (device.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    rates = {
        dtype: matmul_rate(dtype, options.side, options.turns) for dtype in ("float32", "bfloat16")
    }
    results: list[dict[str, Any]] = []
    ended: set[tuple[str, str]] = set()
    for rows in options.sizes:
        for dtype, rate in rates.items():
            for form in FORMS:
                if (dtype, form) in ended:
                    continue
                one = measure(rows, dtype, form, options.turns, limit)
                if one is None or 4 * one["seconds"] > options.longest:
                    ended.add((dtype, form))
                if one is not None:
                    floor = 6 * rows**2 * DIM / rate
                    results.append({**one, "times the floor": one["seconds"] / floor})
                    print(json.dumps(results[-1]), flush=True)
    record = {
        "matmul TFLOP/s": {dtype: round(rate / 1e12, 2) for dtype, rate in rates.items()},
        "results": results,
        **circumstances(),
    }
    kind = device.device_kind.replace(" ", "-")
    (options.out / f"{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{kind}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
