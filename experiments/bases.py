"""The recipe that an experiment changes, at each scale.

smoke: a few steps on the digits, to see that it works. cpu: 2,000 training images and all 10,000
test images of Fashion-MNIST, scaled to 14 pixels; ResNet-10 at an eighth of its width, 80,000
passes of images through the encoder. gpu: configs/cifar10_resnet18.py. paper: configs/resnet50.py.

Learning rates of the cpu scale: see experiments/classification/rates.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset

EPOCHS = 20.0  # of contrastive stages at the cpu scale; cross-entropy has twice as many
RECIPES = {"SupCon": "supcon", "cross-entropy": "cross_entropy"}  # most experiments' two methods
RATES = {"supcon": 0.5, "simclr": 0.15, "cross_entropy": 0.3}
LINEAR_RATES = {"supcon": 9.0, "simclr": 27.0, "cross_entropy": 0.081}  # of a linear stage after it


def base(
    scale: str, recipe: str = "supcon", data: Path | None = None, name: str = ""
) -> ConfigDict:
    """The configuration of a recipe at a scale.

    Args:
      scale: "smoke", "cpu", "gpu" or "paper".
      recipe: see `supcon_jax.config.base`.
      data: folder with `fashion_mnist` (prepared by `supcon_jax.data.prepare`), and `cifar10` and
        `tiny_imagenet32` (folders of images); None: TFDS's own folder.
      name: of another data set than the scale's own.
    """
    make = {"smoke": _smoke, "cpu": _cpu, "gpu": _gpu, "paper": _paper}[scale]
    return make(recipe, data, name)


def published(file: str, recipe: str, data: Path | None) -> ConfigDict:
    """A recipe of the paper as it stands in its file; on ImageNet in the data folder."""
    config = configuration.load(f"{file}:{recipe}")
    config.data.dir = str(data or "")
    return config


def with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """The configuration with some fields changed, by their paths."""
    config.update_from_flattened_dict(dict(fields))
    return config


def _smoke(recipe: str, data: Path | None, name: str) -> ConfigDict:
    config = configuration.load(f"digits:{recipe}")
    config.model.width = 0.0625
    for stage in configuration.STAGES:
        config[stage].update(batch_size=256, epochs=2.0, warmup_epochs=0.0)
    return _unattended(config)


def _cpu(recipe: str, data: Path | None, name: str) -> ConfigDict:
    config = configuration.base(recipe)
    if name == "digits":
        config.data.update(dataset("digits"), holdout=0.0)
    else:
        config.data.update(dataset("fashion_mnist"), per_class=200, holdout=0.0)
        config.data.update(load_size=14, image_size=14, dir=str(data or ""))
    config.model.update(depth=10, width=0.125, normalize=recipe != "cross_entropy")
    for stage in (config.supcon, config.simclr):
        stage.update(batch_size=64, epochs=EPOCHS, warmup_epochs=EPOCHS / 10)
        stage.head.update(layers=(64, 64), batch_norm=True)
    config.linear.update(batch_size=64, epochs=EPOCHS, warmup_epochs=1.0)
    config.cross_entropy.update(batch_size=64, epochs=2 * EPOCHS, warmup_epochs=EPOCHS / 5)
    for stage, rate in {**RATES, "linear": LINEAR_RATES[recipe]}.items():
        config[stage].schedule.update(learning_rate=rate)
        config[stage].optimizer.update(weight_decay=0.0 if stage == "linear" else 5e-4)
        crop = dict(crop_area=(0.5, 1.0), jitter=0.0, grey=0.0)
        config[stage].augment.update(crop, flip=0.0 if name == "digits" else 0.5)
    config.linear.augment.update(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    return _unattended(config)


def _gpu(recipe: str, data: Path | None, name: str) -> ConfigDict:
    name = name or "cifar10"
    file = {"cifar10": "cifar10_resnet18", "tiny_imagenet32": "tiny_imagenet32"}[name]
    config = configuration.load(f"{file}:{recipe}")
    if data is not None:
        config.data.update(source="folder", dir=str(data / name))
    config.data.holdout = 0.0
    config.model.dtype = "bfloat16"
    return _unattended(config, every_epochs=5.0)


def _paper(recipe: str, data: Path | None, name: str) -> ConfigDict:
    return published("resnet50", recipe, data)


def _unattended(config: ConfigDict, every_epochs: float = 1e9) -> ConfigDict:
    """Nothing to look at in between; checkpoints only to go on from."""
    config.evaluation.every_epochs = 0.0
    config.checkpoint.update(every_epochs=every_epochs, keep=1)
    config.log.every_steps = 50
    return config
