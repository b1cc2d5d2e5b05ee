"""What the sharded loss costs on many devices, from the compiled programs: memory, bytes, exchange.

    python experiments/benchmarks/devices.py  # 2, 4 and 8 CPU devices
    pip install "jax[tpu]"  # needs no TPU: its compiler works on any host
    python experiments/benchmarks/devices.py --topology v5e:2x4 v5e:16x16

Forward and backward of `supcon_loss`, two views, D = 128, float32, dense and in blocks, by
gathering and around the ring. Nothing is run. The formula for what a device sends, with N rows in
all and n devices: features gathered and their gradients scattered, 2 x 4 N D (n - 1) / n; around
the ring the features twice and their gradients once, 3 x 4 N D, with 9 bytes of ids a row each time
beside the features; in both the labels once. XLA's own count of operations and of bytes accessed
takes the body of a loop once, and only the dense form by gathering has no loops. On a TPU what fits
into its fast memory is not in the temporary figure, and the compiler may gather by an all-reduce.
Writes devices.json and devices.md, or tpu.json and tpu.md, beside this file.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VIEWS, DIM = 2, 128
FORMS: dict[str, dict[str, Any]] = {
    "gather, dense": {},
    "gather, blocks of 1024": dict(block_size=1024),
    "ring, dense parts": dict(exchange="ring"),
    "ring, blocks of 1024": dict(exchange="ring", block_size=1024),
}


def measure(devices: list[Any], rows: int, form: str) -> dict[str, Any]:
    """The compiler's figures for one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from supcon_jax import supcon_loss
    from supcon_jax.programs import compiled_figures, sent_by_kind

    mesh = Mesh(np.array(devices).reshape(-1), ("data",))
    split = NamedSharding(mesh, P("data"))
    features = jax.ShapeDtypeStruct((rows // VIEWS, VIEWS, DIM), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((rows // VIEWS,), jnp.int32, sharding=split)

    def local(features: Any, labels: Any) -> Any:
        return supcon_loss(features, labels, axis_name="data", **FORMS[form])

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    gradient = jax.jit(jax.grad(lambda features, labels: sharded(features, labels).mean()))
    found = compiled_figures(gradient, features, labels, devices=len(devices))
    sent = sent_by_kind(found.collectives)
    return {
        "devices": len(devices),
        "rows": rows,
        "form": form,
        "temporary MiB": round(found.temporary / 2**20, 2),
        "sent MiB": round(sum(size for _, size in sent.values()) / 2**20, 3),
        "formula MiB": round(formula(rows, len(devices), form) / 2**20, 3),
        "collectives": {kind: count for kind, (count, _) in sent.items()},
        "GFLOP, loops once": round(found.flops / 1e9, 3),
        "accessed MiB, loops once": round(found.accessed / 2**20, 1),
    }


def formula(rows: int, devices: int, form: str) -> float:
    """Bytes that a device sends, forward and backward."""
    whole, labels = 4 * rows * DIM, 4 * rows // VIEWS
    part = (devices - 1) / devices
    if form.startswith("gather"):
        return (2 * whole + labels) * part
    return 3 * whole + 2 * 9 * rows + labels * part


def table(results: list[dict[str, Any]]) -> str:
    names = ["machine", "rows", "form", "temporary MiB", "sent MiB", "formula MiB",
             "GFLOP, loops once", "accessed MiB, loops once", "collectives"]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "| --- | ---: | --- |" + " ---: |" * 5 + " --- |"]
    for result in results:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(result["collectives"].items()))
        cells = [_cell(result[name]) for name in names[:-1]]
        lines += ["| " + " | ".join([*cells, counts]) + " |"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The sharded loss, from its compiled programs.")
    parser.add_argument("--topology", nargs="*", help="TPU topologies in place of CPU devices")
    parser.add_argument("--rows", type=int, nargs="+", default=[12288, 65536])
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not options.topology:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax

    from supcon_jax.programs import tpu_devices

    if options.topology:
        machines = {name: tpu_devices(name) for name in options.topology}
    else:
        machines = {f"{n} CPU devices": jax.devices()[:n] for n in (2, 4, 8)}
    results = []
    for machine, devices in machines.items():
        for rows in options.rows:
            for form in FORMS:
                results.append({"machine": machine, **measure(list(devices), rows, form)})
                print(json.dumps(results[-1]), flush=True)
    command = " ".join(["devices.py", *sys.argv[1:]])
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    record = {
        "command": command,
        "results": results,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", *(["libtpu"] if options.topology else []))
        },
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }
    name = "tpu" if options.topology else "devices"
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / f"{name}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
