"""A recipe of ours in a PyTorch loop of its own: python -m experiments.pytorch.train

Reads the configuration of SupCon at a scale (see `experiments.bases`) and trains both stages by it:
the same images, batch sizes, epochs, schedules, temperature and policies, with another library's
convolutions, random numbers, initial values and augmentations (model.py, augment.py).
Channels-last, bfloat16 by autocast where the recipe has it, torch.compile with `--compile`. Prints
and writes test top-1 and images/s; goes on from its last tenth where it was stopped.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional

from experiments.bases import base
from experiments.pytorch.augment import views
from experiments.pytorch.model import projection, resnet18, supcon_loss
from supcon_jax.report import circumstances
from supcon_jax.stages import open_data

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Images:
    """A split on the device: `[n, channels, h, w]` uint8 and its labels."""

    def __init__(self, source, config: ConfigDict):
        images, labels = source.load(np.arange(source.size))
        self.pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(DEVICE)
        self.labels = torch.from_numpy(labels).long().to(DEVICE)
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(config.data.mean, device=DEVICE).view(shape)
        self.std = torch.tensor(config.data.std, device=DEVICE).view(shape)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of views in [0, 1]."""
        found = (pixels - self.mean) / self.std
        return found.contiguous(memory_format=torch.channels_last)

    def augmented(self, chosen: torch.Tensor, config: ConfigDict, stage: ConfigDict):
        """`stage.views` views of the chosen images, one view of all after the other."""
        pixels, policy = self.pixels[chosen].float() / 255, stage.augment
        coloured = policy.name == "sim_augment"
        options = dict(
            size=config.data.image_size,
            area=tuple(policy.crop_area),
            ratio=tuple(policy.crop_ratio),
            flip=policy.flip,
            jitter=policy.jitter if coloured else 0.0,
            jitter_probability=policy.jitter_probability,
            grey=policy.grey if coloured else 0.0,
        )
        return self.normalised(torch.cat([views(pixels, **options) for _ in range(stage.views)]))


def learning_rate(step: int, stage: ConfigDict, steps: int, epoch: int) -> float:
    """Linear warm-up, then a cosine or steps; `epoch` is its number of steps."""
    schedule, warmup = stage.schedule, round(stage.warmup_epochs * epoch)
    if step < warmup:
        share = step / warmup
        return schedule.warmup_start + share * (schedule.learning_rate - schedule.warmup_start)
    if schedule.name == "step":
        passed = sum(step - warmup > round(b * epoch) for b in schedule.boundaries)
        return schedule.learning_rate * schedule.decay_rate**passed
    if schedule.name != "cosine":
        raise ValueError(f"this loop has the schedules cosine and step; got {schedule.name}")
    cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return schedule.learning_rate * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


def train(
    images: Images,
    config: ConfigDict,
    stage: ConfigDict,
    trained: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    file: Path,
) -> float | None:
    """Train a module in place by SGD; returns views in a second from the 20th step on.

    Args:
      images: training images.
      config: of the run.
      stage: its stage.
      trained: the module whose parameters are trained.
      loss_of: `(views, labels) -> loss`.
      file: where the state is kept, ten times in the stage.
    """
    wanted = stage.optimizer
    if (wanted.name, wanted.exclude if wanted.weight_decay else "none") != ("sgd", "none"):
        raise ValueError("this loop has SGD with a decay of everything only")
    options = dict(momentum=wanted.momentum, weight_decay=wanted.weight_decay)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0, **options)
    per_epoch = len(images.labels) // stage.batch_size
    steps, start = max(1, round(stage.epochs * per_epoch)), 0
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=DEVICE)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    order, spent, seen = torch.empty(0), 0.0, 0
    for step in range(start, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not len(order):
            generator = torch.Generator().manual_seed(1000 * config.seed + epoch)
            order = torch.randperm(len(images.labels), generator=generator).to(DEVICE)
        begin = time.perf_counter()
        chosen = order[place * stage.batch_size : (place + 1) * stage.batch_size]
        optimizer.param_groups[0]["lr"] = learning_rate(step, stage, steps, per_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images.augmented(chosen, config, stage), images.labels[chosen])
        (stage.loss_scale * loss).backward()
        optimizer.step()
        if step % 20 == 19 or step == steps - 1:
            print(f"{file.stem} {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
        if step - start >= 20:  # those before compile and warm up
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - begin
            seen += stage.batch_size * stage.views
        if (step + 1) % max(1, steps // 10) == 0 or step == steps - 1:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, file)
    return round(seen / spent, 1) if spent else None


def run(config: ConfigDict, folder: Path, compiled: bool) -> dict[str, float | None]:
    """Both stages and the test accuracy."""
    torch.manual_seed(config.seed)
    data = open_data(config)
    training, test = Images(data.train, config), Images(data.test, config)
    model, stage = config.model, config.supcon
    if (model.name, model.depth, model.stem) != ("resnet", 18, "cifar"):
        raise ValueError("this loop has ResNet-18 with the CIFAR stem only")
    encoder = resnet18(config.data.channels, model.width, model.first_shortcut)
    head = projection(int(512 * model.width), tuple(stage.head.layers))
    encoder = encoder.to(DEVICE, memory_format=torch.channels_last)
    head = head.to(DEVICE)
    forward = torch.compile(encoder) if compiled else encoder
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=model.dtype == "bfloat16")

    def contrastive(views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with half:
            features = forward(views)
            if model.normalize:
                features = functional.normalize(features.float())
            projected = head(features)
        unit = functional.normalize(projected.float())
        return supcon_loss(unit, labels.repeat(stage.views), stage.objective.temperature)

    both = nn.ModuleList([encoder, head])
    speed = train(training, config, stage, both, contrastive, folder / "supcon.pt")

    encoder.eval().requires_grad_(False)
    classifier = nn.Linear(int(512 * model.width), len(data.train.class_names)).to(DEVICE)

    def features_of(views: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), half:
            features = encoder(views).float()
        return functional.normalize(features) if model.normalize else features

    def classified(views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(classifier(features_of(views)), labels)

    train(training, config, config.linear, classifier, classified, folder / "linear.pt")
    right = 0
    with torch.no_grad():
        for start in range(0, len(test.labels), 1000):
            rows = slice(start, start + 1000)
            logits = classifier(features_of(test.normalised(test.pixels[rows].float() / 255)))
            right += int((logits.argmax(1) == test.labels[rows]).sum())
    return {"top1": right / len(test.labels), "images/s": speed}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A recipe of ours in a PyTorch loop.")
    parser.add_argument("--scale", choices=("smoke", "gpu"), default="gpu")
    parser.add_argument("--data", type=Path, help="folder with cifar10")
    parser.add_argument("--scratch", type=Path, default=Path("runs/pytorch"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    config = base(options.scale, "supcon", options.data)
    config.seed = options.seed
    if options.scale == "smoke":
        config.model.update(depth=18)
        for stage in (config.supcon, config.linear):
            stage.optimizer.update(exclude="none")
    folder = options.scratch / f"{options.scale}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = run(config, folder, options.compile)
    record = {
        **found,
        "command": f"python -m experiments.pytorch.train --scale {options.scale} "
        f"--seed {options.seed}{' --compile' * options.compile}",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        **circumstances(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.scale}-seed{options.seed}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
