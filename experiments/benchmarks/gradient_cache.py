"""What the gradient cache costs in time and saves in memory, beside the step of a whole batch.

    python experiments/benchmarks/gradient_cache.py --batch 256 --parts 2 4 8 16

A SupCon step of ResNet-18 (CIFAR stem), or of a ViT-Ti with patches of 4 pixels (--encoder vit), on
32 x 32 images, with augmentation and update, direct and in micro-batches. All take turns, and so
does one forward pass of the whole batch in training mode: the cache encodes everything twice, so
1 + forward / direct step is the least that its time over the direct step's should be, about 4/3
where a backward pass takes twice a forward one (less only where parts run faster than the whole
batch, which is larger than the caches). Memory is the compiler's figure for temporary arrays. On a
CPU it is the ViT that tells about the cache: a ResNet's parts are compiled without a loop there,
and the second encoding with its saving of memory is compiled away (docs/recipes.md). On the first
GPU where JAX finds one and else on the CPU. Writes gradient_cache.json and gradient_cache.md beside
this file (--out).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.data.sources import Source
from supcon_jax.report import circumstances
from supcon_jax.steps import forward

FORWARD = "forward pass"


def random_images(count: int) -> Source:
    images = np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3), np.uint8)
    labels = np.arange(count, dtype=np.int32) % 10
    names = tuple(map(str, range(10)))
    return Source(
        "random", count, names, (32, 32, 3), lambda i: (images[i], labels[i]), lambda: labels
    )


def step_of(options: argparse.Namespace, parts: int) -> tuple[Callable[[], Any], float]:
    """A training step in so many parts, and MiB of its temporary arrays."""
    config = configuration.load("cifar10_resnet18")
    config.model.update(name=options.encoder, size="ti", patch=4)
    config.model.update(dtype=options.dtype, width=options.width)
    config.supcon.update(batch_size=options.batch, warmup_epochs=0.0, micro_batches=parts)
    source, mesh = random_images(options.batch), parallel.make_mesh(jax.devices()[:1])
    stage = stages.build_stage(config, "supcon", stages.Data(source, source, source, source), mesh)
    state = stages.create(stage, config, mesh, None)
    batch = next(stages.batches(stage, 0, config, source, mesh))
    compiled = stage.train_step.lower(state, batch).compile()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return step, compiled.memory_analysis().temp_size_in_bytes / 2**20


def forward_of(options: argparse.Namespace) -> tuple[Callable[[], Any], float]:
    """All views through the network of that step, in training mode."""
    config = configuration.load("cifar10_resnet18")
    config.model.update(name=options.encoder, size="ti", patch=4, batch_norm="local")
    config.model.update(dtype=options.dtype, width=options.width)
    model = stages.build_model(config, "supcon", classes=10)
    views = jax.random.uniform(jax.random.key(0), (options.batch, 2, 32, 32, 3))
    variables = jax.jit(partial(model.init, train=False))(
        jax.random.key(1), jnp.zeros_like(views[0])
    )
    variables = {"batch_stats": {}, **variables}
    compiled = jax.jit(partial(forward, model)).lower(variables, views).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: compiled(variables, views), temporary


def seconds_of(contestants: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each in each turn; the first turn warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def summary(seconds: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    """Medians, and ratios to the direct step turn by turn."""
    direct = seconds["1"]
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, direct, strict=True)]
        found[name] = {
            "seconds": round(statistics.median(times), 4),
            "over direct": spread([1 + r for r in ratios] if name == FORWARD else ratios),
            "temporary MiB": round(memory[name], 1),
        }
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| micro-batches | seconds a step | over the direct step | temporary MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, of in found.items():
        ratio = of["over direct"]
        title = f"{FORWARD} alone; 1 + its share" if name == FORWARD else name
        span = f"{ratio['median']} ({ratio['min']} to {ratio['max']})"
        lines.append(f"| {title} | {of['seconds']} | {span} | {of['temporary MiB']:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images; each in two views")
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--encoder", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--width", type=float, default=1.0, help="of the ResNet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    made = {str(parts): step_of(options, parts) for parts in (1, *options.parts)}
    made[FORWARD] = forward_of(options)
    seconds = seconds_of({name: run for name, (run, _) in made.items()}, options.turns)
    found = summary(seconds, {name: temporary for name, (_, temporary) in made.items()})
    record = {
        "command": f"gradient_cache.py --batch {options.batch} --parts "
        f"{' '.join(map(str, options.parts))} --encoder {options.encoder} "
        f"--width {options.width} --dtype {options.dtype} --turns {options.turns}",
        "micro-batches": found,
        **circumstances(),
    }
    (options.out / "gradient_cache.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "gradient_cache.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
