"""Tiny ImageNet at 32 x 32 (200 classes, 100,000 + 10,000 images), ResNet-18, 100 epochs.

    python -m supcon_jax.train --config configs/tiny_imagenet32.py --config.data.dir=PATH

PATH/{train,val}/CLASS/IMAGE. As configs/cifar10_resnet18.py with AutoAugment's CIFAR table, so that
a published policy of learnt operations is trained at this size too. With 200 classes and 1,024
images a batch, an anchor has about 9 positives. Accuracy: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10_resnet18:{recipe}")
    config.data.update(dataset("tiny_imagenet32"))
    for stage in (config.supcon, config.cross_entropy):
        stage.augment.update(name="auto_augment", table="cifar")
    return config
