"""Fashion-MNIST (60,000 + 10,000 grey images, 28 x 28) from TFDS, on one CPU or GPU.

Prepare the data once, without TensorFlow, then train:

    python -m supcon_jax.data.prepare fashion_mnist
    python -m supcon_jax.train --config configs/fashion_mnist.py

ResNet-18 with the CIFAR stem at a quarter of its width; the learning rates are the CIFAR recipe's
scaled to the batch of 256. On 2 CPU cores an epoch takes minutes: lower --config.supcon.epochs.
Accuracy: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(dataset("fashion_mnist"))
    config.model.update(width=0.25)
    for stage in (config.supcon, config.simclr):
        stage.update(epochs=50.0, warmup_epochs=2.0)
        stage.schedule.update(learning_rate=0.2)
        stage.head.update(layers=(128, 128))
        stage.augment.update(crop_area=(0.4, 1.0), jitter=0.25, grey=0.0)
    config.linear.update(epochs=10.0)
    config.linear.optimizer.update(weight_decay=0.0)
    config.linear.schedule.update(learning_rate=0.5)
    config.cross_entropy.update(epochs=100.0, warmup_epochs=2.0)
    config.cross_entropy.schedule.update(learning_rate=0.1)
    config.cross_entropy.optimizer.update(weight_decay=5e-4)
    for stage in (config.linear, config.cross_entropy):
        stage.augment.update(crop_area=(0.6, 1.0), jitter=0.0, grey=0.0)
    return config
