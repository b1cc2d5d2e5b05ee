"""SVHN (house numbers, 73,257 + 26,032 images, 32 x 32), ResNet-18: the short CIFAR recipe.

    python -m supcon_jax.train --config configs/svhn.py

As configs/cifar10_resnet18.py without mirroring, which turns digits into no digits. Nothing was
published on this set with this method. Accuracy: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10_resnet18:{recipe}")
    config.data.update(dataset("svhn"))
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        config[name].augment.update(flip=0.0)
    return config
