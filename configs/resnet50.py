"""ImageNet, ResNet-50: the published recipes of SupCon (78.7 % top-1), SimCLR and cross-entropy.

    python -m supcon_jax.train --config configs/resnet50.py --config.data.dir=TFDS_DIR

`imagenet2012` from TFDS (array_record), or an image folder with the splits train and validation;
images are streamed: docs/data.md says how many host cores that needs.

SupCon: batch 6,144, temperature 0.1, loss times the temperature, linear projection to 128 of the
normalised embedding, AutoAugment, LARS at 9.6, 350 epochs; linear stage: RMSProp at 1.2, 90 epochs.
Values: https://github.com/google-research/google-research/tree/master/supcon, scripts/
{supcon,simclr,cross_entropy}_imagenet_resnet50.sh in their last version, where the first versions
had other learning rates and weight decays; docs/recipes.md compares them field by field.
The sources disagree about cross-entropy's accuracy (78.2, 77.6, 77.1) and SimCLR's 70.2 % belongs
to a script of 100 epochs: both are taken from the scripts.
Published hardware: 128 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base
from supcon_jax.data.datasets import dataset

BATCH = 6144


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(dataset("imagenet"), holdout=0.0)
    config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # pixels in [-1, 1], as there
    config.model.update(depth=50, stem="imagenet", dtype="bfloat16")
    config.model.update(normalize=recipe == "supcon")
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        config[name].update(batch_size=BATCH, warmup_epochs=12.0)
        config[name].augment.update(name="auto_augment", crop_area=(0.08, 1.0))
        config[name].optimizer.update(exclude="norm")

    config.supcon.update(epochs=350.0, loss_scale=0.1)
    config.supcon.head.update(kernel_init="normal_0.01")
    config.supcon.optimizer.update(name="lars", weight_decay=1e-3, weight_decay_kind="lars")
    config.supcon.schedule.update(learning_rate=0.4 * BATCH / 256)

    config.simclr.update(epochs=100.0)
    config.simclr.objective.update(temperature=0.1)
    config.simclr.head.update(layers=(2048, 2048, 128), batch_norm=True, kernel_init="normal_0.01")
    config.simclr.optimizer.update(name="lars", weight_decay=1e-4, weight_decay_kind="lars")
    config.simclr.schedule.update(learning_rate=0.3 * BATCH / 256)

    config.linear.update(epochs=90.0)
    config.linear.objective.update(label_smoothing=0.05)
    config.linear.head.update(kernel_init="glorot_uniform")
    config.linear.optimizer.update(name="rmsprop", epsilon=1e-3, weight_decay=1e-6)
    config.linear.schedule.update(name="exponential", learning_rate=0.05 * BATCH / 256)
    config.linear.schedule.update(decay_rate=0.97, decay_epochs=0.5)

    config.cross_entropy.update(epochs=200.0)
    config.cross_entropy.objective.update(label_smoothing=0.05)
    config.cross_entropy.head.update(kernel_init="glorot_uniform")
    config.cross_entropy.optimizer.update(name="nesterov", weight_decay=1e-4)
    config.cross_entropy.schedule.update(learning_rate=0.1 * BATCH / 256)

    if recipe == "simclr":  # its linear stage is another one
        for stage in (config.simclr, config.linear):
            stage.augment.update(name="sim_augment", jitter=1.0, jitter_form="tensorflow", blur=0.5)
        config.linear.head.update(kernel_init="zeros")
        config.linear.optimizer.update(name="nesterov")
        config.linear.schedule.update(name="cosine", learning_rate=0.1 * BATCH / 256)
    return config
