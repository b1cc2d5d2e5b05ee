"""Imagenette (10 classes of ImageNet), torchvision's ResNet-18 at 128 x 128, 100 epochs.

    python -m supcon_jax.train --config configs/imagenette.py --config.data.dir=PATH

PATH/{train,val}/CLASS/IMAGE, as https://github.com/fastai/imagenette unpacks (its 160 px version is
enough). SimAugment of strength 1 with blur, as SimCLR on ImageNet; the learning rates are the
CIFAR recipe's scaled to the batch of 256; cross-entropy with AutoAugment. Own values: nothing was
published on this set with this method. Accuracy: not yet run whole.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(dataset("imagenette"), load_size=160, image_size=128)
    config.model.update(depth=18, stem="imagenet", first_shortcut="identity")  # torchvision's
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        config[name].augment.update(crop_area=(0.08, 1.0), jitter=1.0, blur=0.5)
    for stage in (config.supcon, config.simclr):
        stage.update(batch_size=256, epochs=100.0, warmup_epochs=10.0)
        stage.update(loss_scale=stage.objective.temperature / 0.07)
        stage.head.update(layers=(512, 128))
        stage.schedule.update(learning_rate=0.125)
    config.linear.update(batch_size=256, epochs=50.0)
    config.linear.optimizer.update(weight_decay=0.0)
    config.linear.schedule.update(learning_rate=1.0)
    config.linear.augment.update(name="crop_flip")
    config.cross_entropy.update(batch_size=256, epochs=200.0, warmup_epochs=10.0)
    config.cross_entropy.objective.update(label_smoothing=0.05)
    config.cross_entropy.optimizer.update(name="nesterov")
    config.cross_entropy.schedule.update(learning_rate=0.1)
    config.cross_entropy.augment.update(name="auto_augment")
    return config
