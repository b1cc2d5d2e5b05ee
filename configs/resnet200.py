"""ImageNet, ResNet-200: the paper's best (81.4 % top-1), with momentum in place of LARS for now.

    python -m supcon_jax.train --config configs/resnet200.py --config.data.dir=TFDS_DIR

As configs/resnet50.py, and what differs from the published run is listed there; but batch 4,096 and
700 epochs (cross-entropy also 700; stacked RandAugment is still SimAugment without blur).
Sources: arXiv:2004.11362 and google-research/supcon, scripts/supcon_imagenet_resnet200.sh.
Published hardware: 256 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"resnet50:{recipe}")
    config.model.update(depth=200)
    for stage in (config.supcon, config.simclr, config.linear, config.cross_entropy):
        stage.update(batch_size=4096)
        stage.schedule.update(learning_rate=stage.schedule.learning_rate * 4096 / 6144)
    config.supcon.update(epochs=700.0)
    config.simclr.update(epochs=700.0)
    config.cross_entropy.update(epochs=700.0)
    return config
