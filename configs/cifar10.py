"""CIFAR-10: ResNet-18 with the CIFAR stem by default, the authors' ResNet-50 recipe as an option.

    python -m supcon_jax.train --config configs/cifar10.py                      # TFDS
    python -m supcon_jax.train --config configs/cifar10.py --config.data.source=folder \
        --config.data.dir=PATH                                # PATH/{train,test}/CLASS/IMAGE

The published run is the same with --config.model.depth=50 --config.supcon.epochs=1000
--config.data.holdout=0 (96.0 % linear top-1; cross-entropy: 500 epochs, 95.0 %). It comes from
https://github.com/HobbitLong/SupContrast: batch 1,024, SGD with momentum 0.9 at a learning rate of
0.5 on the loss times temperature / 0.07 (`loss_scale`), cosine to a thousandth, 10 epochs of
warm-up, weight decay 1e-4 on everything, MLP head 2048-128, batch norm local to each device, linear
stage on crop and flip only. That code steps the linear learning rate down at epochs 60, 75 and 90;
here it follows a cosine.
Accuracy of the default: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(source="tfds", name="cifar10", load_size=32, image_size=32)
    config.data.update(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), holdout=0.02)
    config.model.update(depth=18, batch_norm="local", zero_init_residual=False)
    for stage in (config.supcon, config.simclr):
        stage.update(batch_size=1024, epochs=100.0, warmup_epochs=10.0)
        stage.update(loss_scale=stage.objective.temperature / 0.07)
        stage.head.update(layers=(2048, 128))
        stage.schedule.update(learning_rate=0.5, final_ratio=1e-3)
        stage.optimizer.update(decay_all=True)
    config.linear.update(batch_size=512, epochs=100.0)
    config.linear.optimizer.update(weight_decay=0.0)
    config.linear.schedule.update(learning_rate=5.0 if recipe == "supcon" else 1.0)
    config.cross_entropy.update(batch_size=1024, epochs=200.0, warmup_epochs=10.0)
    config.cross_entropy.schedule.update(learning_rate=0.8, final_ratio=1e-3)
    config.cross_entropy.optimizer.update(decay_all=True)
    for stage in (config.linear, config.cross_entropy):
        stage.augment.update(jitter=0.0, grey=0.0)
    return config
