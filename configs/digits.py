"""scikit-learn's 1,797 handwritten digits (8 x 8 pixels): the recipe of `make demo`, no download.

    python -m supcon_jax.train --config configs/digits.py

ResNet-10 with the CIFAR stem at an eighth of its width, half a minute on 2 CPU cores. Temperature
0.2 and batch norm in the projection (the paper: 0.1 and none) leave the collapsed state sooner,
which counts in so short a run. Cross-entropy has 180 epochs: as many passes of images through the
encoder as SupCon's 90 epochs of two views. Learning rates were chosen on held-out training images;
accuracies with their spread over seeds, beside cross-entropy and k-NN on the pixels:
experiments/digits/README.md.
"""

from ml_collections import ConfigDict

from supcon_jax.config import STAGES, base
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(dataset("digits"), holdout=0.03)
    config.model.update(depth=10, width=0.125, normalize=recipe != "cross_entropy")
    config.checkpoint.update(every_epochs=30.0)  # ten seconds
    for name in STAGES:
        stage = config[name]
        stage.update(batch_size=128)
        stage.augment.update(crop_area=(0.6, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    for stage in (config.supcon, config.simclr):
        stage.update(epochs=90.0, warmup_epochs=9.0)
        stage.head.update(layers=(64, 64), batch_norm=True)
        stage.schedule.update(learning_rate=0.5)
        stage.optimizer.update(weight_decay=5e-4)
    config.supcon.objective.update(temperature=0.2)
    config.linear.update(epochs=50.0, warmup_epochs=1.0)
    config.linear.schedule.update(learning_rate=3.0)
    config.linear.augment.update(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    config.cross_entropy.update(epochs=180.0, warmup_epochs=18.0)
    config.cross_entropy.schedule.update(learning_rate=1.0)
    config.cross_entropy.optimizer.update(weight_decay=5e-4)
    return config
