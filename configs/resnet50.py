"""ImageNet, ResNet-50: the paper's recipe (78.7 % top-1), with momentum in place of LARS for now.

    python -m supcon_jax.train --config configs/resnet50.py --config.data.dir=TFDS_DIR

`imagenet2012` from TFDS (array_record), or an image folder with the splits train and validation.
Batch 6,144, temperature 0.1, loss times the temperature, linear projection to 128 of the normalised
embedding, global batch norm, bfloat16, 350 + 90 epochs with 12 of warm-up each, label smoothing
0.05. Sources: arXiv:2004.11362 and google-research/supcon, scripts/supcon_imagenet_resnet50.sh.

What differs from the published run until the optimizers and policies are complete: LARS (learning
rate 9.6) is SGD with momentum, which reached 77.7 % in the paper's Table 8 at a learning rate that
it does not print (here: the authors' CIFAR rate, 0.5 x batch / 256); RMSProp in the linear stage is
Nesterov; AutoAugment is SimAugment without blur; images are cut to their middle square when loaded.
Published hardware: 128 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    config.data.update(source="tfds", name="imagenet2012", test_split="validation")
    config.data.update(load_size=256, image_size=224, holdout=0.01)
    config.model.update(depth=50, stem="imagenet", dtype="bfloat16")
    config.model.update(normalize=recipe == "supcon")
    for stage in (config.supcon, config.simclr):
        stage.update(batch_size=6144, epochs=350.0, warmup_epochs=12.0, loss_scale=0.1)
        stage.schedule.update(learning_rate=0.5 * stage.batch_size / 256)
        stage.augment.update(crop_area=(0.08, 1.0), jitter=1.0)
    config.simclr.update(epochs=100.0, loss_scale=1.0)
    config.simclr.objective.update(temperature=0.1)
    config.simclr.head.update(layers=(2048, 2048, 128), batch_norm=True)
    config.linear.update(batch_size=6144, epochs=90.0, warmup_epochs=12.0)
    config.linear.optimizer.update(nesterov=True, weight_decay=1e-6)
    config.linear.schedule.update(learning_rate=0.1 * config.linear.batch_size / 256)
    config.cross_entropy.update(batch_size=6144, epochs=200.0, warmup_epochs=12.0)
    config.cross_entropy.optimizer.update(nesterov=True)
    config.cross_entropy.schedule.update(learning_rate=0.1 * config.cross_entropy.batch_size / 256)
    for stage in (config.linear, config.cross_entropy):
        stage.objective.update(label_smoothing=0.05)
        stage.augment.update(crop_area=(0.08, 1.0))
    return config
