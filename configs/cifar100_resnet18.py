"""CIFAR-100, ResNet-18 and 100 epochs: the published recipe made short, for one GPU.

    python -m supcon_jax.train --config configs/cifar100_resnet18.py

As configs/cifar10_resnet18.py. Accuracy: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10_resnet18:{recipe}")
    config.data.update(dataset("cifar100"))
    return config
