"""ImageNet, ResNet-200: the paper's best (81.4 % top-1; cross-entropy 80.9 %).

    python -m supcon_jax.train --config configs/resnet200.py --config.data.dir=TFDS_DIR

As configs/resnet50.py but batch 4,096, LARS at 3.2, weight decay 1e-4, 700 epochs (cross-entropy
700 too) and stacked RandAugment: colour jitter of strength 1, then RandAugment of 2 operations at
magnitude 10 (the order and the fixed 10 are the code's; the paper's text has RandAugment first),
grey, blur. Values: google-research/supcon, scripts/{supcon,cross_entropy}_imagenet_resnet200.sh.
SimCLR has no script at this depth: ResNet-50's at this batch.
Published hardware: 256 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"resnet101:{recipe}")
    config.model.update(depth=200)
    config.supcon.update(epochs=700.0)
    config.supcon.schedule.update(learning_rate=0.2 * config.supcon.batch_size / 256)
    config.cross_entropy.update(epochs=700.0)
    config.cross_entropy.augment.update(name="stacked_rand_augment", layers=2, magnitude=10.0)
    config.cross_entropy.augment.update(jitter=1.0, jitter_form="tensorflow", blur=0.5)
    return config
