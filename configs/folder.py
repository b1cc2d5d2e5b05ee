"""Your own images: PATH/{train,test}/CLASS/IMAGE, in any format that Pillow reads.

    python -m supcon_jax.train --config configs/folder.py --config.data.dir=PATH

ResNet-18 at 128 x 128 with the recipe of configs/imagenette.py: a start for photographs. What to
change first: --config.data.train_split and test_split where the splits have other names,
--config.data.image_size and load_size (with --config.model.stem=cifar below 64 pixels),
--config.supcon.batch_size (at least a few images of each class in a batch), and
--config.supcon.augment.flip=0 where left and right differ.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"imagenette:{recipe}")
    config.data.update(dataset("folder"))
    return config
