"""ImageNet, ViT-S/16: the contrastive method on a Vision Transformer. Own values, no published run.

    python -m supcon_jax.train --config configs/vit_small.py --config.data.dir=TFDS_DIR

The paper claims the method for any encoder and trains ResNets only. Optimizer and schedule follow
DeiT (https://arxiv.org/abs/2012.12877): AdamW at 5e-4 x batch / 512, betas 0.9 and 0.999, decoupled
weight decay 0.05 on kernels, cosine; 40 epochs of warm-up as MoCo v3 (https://arxiv.org/abs/
2104.02057) has for ViT; stacked RandAugment as for the paper's ResNet-200. Temperature, projection
and loss scale are the ResNet-50 recipe's. Cross-entropy adds mixup and a parameter average.
Accuracy: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration

BATCH = 4096


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"resnet101:{recipe}")
    config.model.update(name="vit", size="s", patch=16)
    for stage in (config.supcon, config.simclr, config.cross_entropy):
        stage.update(batch_size=BATCH, epochs=300.0, warmup_epochs=40.0)
        stage.optimizer.update(name="adamw", epsilon=1e-8, betas=(0.9, 0.999))
        stage.optimizer.update(weight_decay=0.05, weight_decay_kind="decoupled")
        stage.optimizer.update(exclude="norm_and_bias")
        stage.schedule.update(learning_rate=5e-4 * BATCH / 512)
        stage.augment.update(name="stacked_rand_augment", jitter=1.0, blur=0.5)
    config.cross_entropy.update(warmup_epochs=5.0, mix="mixup", mix_alpha=0.8, average=0.9999)
    return config
