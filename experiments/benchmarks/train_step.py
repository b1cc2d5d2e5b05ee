"""Training speed beside PyTorch: one SupCon step of ResNet-18 on 32 x 32 images, both in one run.

    pip install torch
    python -m experiments.benchmarks.train_step --batch 64 --steps 10

The same model (CIFAR stem, projection shortcuts), batch of two views, SGD with momentum, float32 or
bfloat16 (PyTorch: autocast; --compile for torch.compile), on the first GPU where JAX finds one and
else on the CPU. Our step also augments the images; the PyTorch loop gets the views ready-made, so
the ratio is to our disadvantage by the time of the augmentation. The two take turns, so that a slow
minute of a shared machine meets both. Writes train_step.json (--out) beside this file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.pytorch.model import projection, resnet18, supcon_loss
from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.data.sources import Source
from supcon_jax.report import circumstances


def torch_loop(batch: int, dtype: str, compiled: bool) -> Callable[[], None]:
    """A step of the PyTorch loop; channels-last, which is its faster layout."""
    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = nn.Sequential(resnet18(), projection(512, (2048, 128)))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(model) if compiled else model
    views = torch.randn(2 * batch, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device).repeat(2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            features = forward(views)
        loss = supcon_loss(functional.normalize(features.float()), labels, 0.1)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def jax_loop(batch: int, dtype: str) -> Callable[[], None]:
    """A step of our training loop, with its augmentations."""
    config = configuration.load("cifar10_resnet18")
    config.model.update(dtype=dtype)
    config.supcon.update(batch_size=batch, warmup_epochs=0.0)
    images = np.random.RandomState(0).randint(0, 256, (10 * batch, 32, 32, 3), np.uint8)
    labels = np.arange(10 * batch, dtype=np.int32) % 10
    names = tuple(map(str, range(10)))
    source = Source(
        "random", len(labels), names, (32, 32, 3), lambda i: (images[i], labels[i]), lambda: labels
    )
    mesh = parallel.make_mesh(jax.devices()[:1])
    stage = stages.build_stage(config, "supcon", stages.Data(source, source, source, source), mesh)
    state = stages.create(stage, config, mesh, None)
    batches = stages.batches(stage, 0, config, source, mesh)

    def step() -> None:
        nonlocal state
        state, metrics = stage.train_step(state, next(batches))
        float(metrics["loss"])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed beside PyTorch.")
    parser.add_argument("--batch", type=int, default=64, help="images; each in two views")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="PyTorch's model by torch.compile")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    loops = {
        "supcon_jax": jax_loop(options.batch, options.dtype),
        "PyTorch": torch_loop(options.batch, options.dtype, options.compile),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(options.steps + 2):
        for name, step in loops.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # the first two compile and warm up
                times[name].append(time.perf_counter() - start)
    speed = {name: 2 * options.batch / statistics.median(t) for name, t in times.items()}
    ratios = [b / a for a, b in zip(times["supcon_jax"], times["PyTorch"], strict=True)]
    record = {
        "command": f"python -m experiments.benchmarks.train_step --batch {options.batch} "
        f"--steps {options.steps} --dtype {options.dtype}{' --compile' * options.compile}",
        "images/s, median": {name: round(value, 1) for name, value in speed.items()},
        "speed over PyTorch's, by turns": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "seconds a step": {name: [round(x, 3) for x in t] for name, t in times.items()},
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        **circumstances(),
    }
    text = json.dumps(record, indent=1)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
