"""CIFAR-10, ResNet-18, batches of 128 beside a labelled queue of a momentum encoder's features.

    python -m supcon_jax.train --config configs/moco_cifar10.py                 # TFDS
    python -m supcon_jax.train --config configs/moco_cifar10.py --config.data.source=folder \
        --config.data.dir=PATH                                # PATH/{train,test}/CLASS/IMAGE

configs/cifar10_resnet18.py with an eighth of its batch, learning rate in proportion, and a queue
of 4,096 features at momentum 0.99, as MoCo's own CIFAR demonstration (https://github.com/
facebookresearch/moco). With ten classes a tenth of the queue are positives of each anchor. Features
are kept from the second epoch on and used for 4,096 / 128 = 32 steps. Own values otherwise.
experiments/small_batches compares it, on a CPU, with the same batch alone and with a large batch in
parts (`micro_batches`). Accuracy: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"cifar10_resnet18:{recipe}")
    for stage in (config.supcon, config.simclr):
        stage.update(batch_size=128)
        stage.schedule.update(learning_rate=0.5 * 128 / 1024)
        stage.queue.update(size=4096, momentum=0.99, from_epoch=1.0)
        stage.objective.update(contrast_mode="one")
    return config
