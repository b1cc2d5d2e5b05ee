"""Training speed beside PyTorch: one SupCon step of ResNet-18 on 32 x 32 images, both in one run.

    pip install torch
    python experiments/benchmarks/train_step.py --batch 64 --steps 10

The same model (CIFAR stem, projection shortcuts), batch of two views, SGD with momentum, float32 or
bfloat16 (PyTorch: autocast), on the first GPU where JAX finds one and else on the CPU. Our step
also augments the images; the PyTorch loop gets the views ready-made, so the ratio is to our
disadvantage by the time of the augmentation. The two take turns, so that a slow minute of a shared
machine meets both. Writes train_step.json (--out) beside this file.
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

from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.data.sources import Source
from supcon_jax.report import circumstances

TEMPERATURE, RATE, DECAY = 0.1, 0.5, 1e-4


class Block(nn.Module):
    """Basic residual block, with a projection shortcut where asked."""

    def __init__(self, inputs: int, filters: int, stride: int, project: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18_with_head() -> nn.Sequential:
    """ResNet-18 with the CIFAR stem and an MLP projection."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for group in range(4):
        filters = 64 * 2**group
        layers += [
            Block(inputs, filters, 2 if group else 1, project=True),
            Block(filters, filters, 1, project=False),
        ]
        inputs = filters
    head = [nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 128, bias=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def torch_supcon(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Eq. 2 for features [n, dim] with labels [n]."""
    logits = features @ features.T / TEMPERATURE
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = logits.masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels[None]) & ~itself
    log_ratios = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
    return -(log_ratios.sum(1) / positive.sum(1)).mean()


def torch_loop(batch: int, dtype: str) -> Callable[[], None]:
    """A step of the PyTorch loop; channels-last, which is its faster layout."""
    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = resnet18_with_head().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    views = torch.randn(2 * batch, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device).repeat(2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            features = model(views)
        loss = torch_supcon(functional.normalize(features.float()), labels)
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
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    loops = {
        "supcon_jax": jax_loop(options.batch, options.dtype),
        "PyTorch": torch_loop(options.batch, options.dtype),
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
        "command": f"train_step.py --batch {options.batch} --steps {options.steps} "
        f"--dtype {options.dtype}",
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
