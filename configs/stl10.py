"""STL-10 (5,000 + 8,000 labelled images, 96 x 96), ResNet-18: the short CIFAR recipe.

    python -m supcon_jax.train --config configs/stl10.py

As configs/cifar10_resnet18.py with torchvision's ResNet-18, batch 256, the learning rates scaled to
it, and blur. Nothing was published on the labelled part with this method. Accuracy: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10_resnet18:{recipe}")
    config.data.update(dataset("stl10"))
    config.model.update(stem="imagenet", first_shortcut="identity")  # torchvision's
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        stage = config[name]
        stage.schedule.update(learning_rate=stage.schedule.learning_rate * 256 / stage.batch_size)
        stage.update(batch_size=256)
    for stage in (config.supcon, config.simclr):
        stage.augment.update(blur=0.5)
    return config
