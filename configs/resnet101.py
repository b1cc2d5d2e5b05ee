"""ImageNet, ResNet-101: the published SupCon recipe (80.2 % top-1).

    python -m supcon_jax.train --config configs/resnet101.py --config.data.dir=TFDS_DIR

As configs/resnet50.py but batch 4,096, LARS at 6.4 and weight decay 1e-4 (google-research/supcon,
scripts/supcon_imagenet_resnet101.sh). The paper's Table 3 has stacked RandAugment where that script
has AutoAugment: taken from the paper, whose accuracy it is. There are no scripts of SimCLR and
cross-entropy at this depth: those are ResNet-50's at this batch.
Published hardware: 128 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration

BATCH = 4096


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"resnet50:{recipe}")
    config.model.update(depth=101)
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        stage = config[name]
        stage.schedule.update(learning_rate=stage.schedule.learning_rate * BATCH / stage.batch_size)
        stage.update(batch_size=BATCH)
    config.supcon.optimizer.update(weight_decay=1e-4)
    if recipe == "supcon":
        for stage in (config.supcon, config.linear):
            stage.augment.update(name="stacked_rand_augment", layers=2, magnitude=10.0, blur=0.5)
            stage.augment.update(jitter=1.0, jitter_form="tensorflow")
    return config
