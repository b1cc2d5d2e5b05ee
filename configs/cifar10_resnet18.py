"""CIFAR-10, ResNet-18 and 100 epochs: the published recipe made short, for one GPU.

    python -m supcon_jax.train --config configs/cifar10_resnet18.py             # TFDS
    python -m supcon_jax.train --config configs/cifar10_resnet18.py --config.data.source=folder \
        --config.data.dir=PATH                                # PATH/{train,test}/CLASS/IMAGE

As configs/cifar10.py but a smaller network, 100 epochs (cross-entropy: 200, as many passes of
images through the encoder) and 2 % of the training images held out to look at during training.
A CPU wants --config.model.width=0.25 and patience: experiments/cifar10 has 300 steps of it.
Accuracy: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10:{recipe}")
    config.data.update(holdout=0.02)
    config.model.update(depth=18)
    for stage in (config.supcon, config.simclr):
        stage.update(epochs=100.0)
    config.cross_entropy.update(epochs=200.0)
    return config
