"""Your own images: PATH/{train,test}/CLASS/IMAGE or PATH/CLASS/IMAGE, in any format Pillow reads.

    python -m supcon_jax.train --config configs/folder.py --config.data.dir=PATH

ResNet-18, torchvision's where the stem is "imagenet". What is 0 or empty here is chosen from the
images that are found, and printed with the reason: splits, image size, stem, colours, batch sizes,
epochs and learning rates (supcon_jax/fitting.py); any of it can be set instead. Where there are no
test images, a fifth of each class is kept for the test. What to think of yourself:
--config.supcon.augment.flip=0 where left and right differ, --config.supcon.augment.jitter=0 where
the colour tells the class, and on a CPU --config.model.width=0.25. Own values, for small data sets:
the recipe of configs/imagenette.py with batch norm in the projection head and four times its
learning rate, which short trainings need.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"imagenette:{recipe}")
    config.data.update(train_split="", test_split="", dir="")
    config.data.update(load_size=0, image_size=0, channels=0, mean=(), std=())
    config.model.update(stem="")
    for stage in (config.supcon, config.simclr):
        stage.head.update(batch_norm=True)
    for name in configuration.STAGES:
        config[name].update(batch_size=0, epochs=0.0)
        config[name].schedule.update(learning_rate=0.0)
        config[name].augment.update(crop_area=(0.2, 1.0), jitter=0.5, blur=0.0)
    return config
