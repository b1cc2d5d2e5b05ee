"""ImageNet, ResNet-50 with a momentum encoder and a labelled queue: 8 GPUs, not 128 TPU cores.

    python -m supcon_jax.train --config configs/moco_resnet50.py --config.data.dir=TFDS_DIR
    python -m supcon_jax.train --config configs/moco_resnet50.py:simclr ...     # MoCo v2 itself

The paper (section 4.1) reports 79.1 % top-1 with a memory of 8,192 features, a batch of 256 and SGD
on 8 V100; the code was never released. Its author wrote "most hyper-parameters from MoCo-v2", a
temperature of 0.07 and a batch of 1,024 (https://github.com/HobbitLong/SupContrast/issues/120).
Here: the paper's memory and batch, the author's temperature, and all else from MoCo v2 (https://
github.com/facebookresearch/moco): learning rate 0.03, cosine, 200 epochs, MLP head 2048-128,
momentum 0.999, crop, jitter, grey and blur, linear stage at 30 with drops at 60 and 80. Not from
there: batch norm is global instead of shuffled, and the other queries of the batch are contrasted
with too. A feature is used for 8,192 / 256 = 32 steps. `:simclr` has MoCo v2's own memory of 65,536
and temperature of 0.2 (67.5 %); `:cross_entropy` is that of configs/resnet50.py.
Published hardware: 8 V100. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax import config as configuration


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = configuration.load(f"resnet50:{recipe}")
    if recipe == "cross_entropy":
        return config
    config.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.model.update(normalize=False, zero_init_residual=False)
    for stage, size, temperature in ((config.supcon, 8192, 0.07), (config.simclr, 65_536, 0.2)):
        stage.update(batch_size=256, epochs=200.0, warmup_epochs=0.0, loss_scale=1.0)
        stage.queue.update(size=size, momentum=0.999)
        stage.objective.update(temperature=temperature, contrast_mode="one")
        stage.head.update(layers=(2048, 128), batch_norm=False, kernel_init="lecun_normal")
        stage.optimizer.update(name="sgd", weight_decay=1e-4, weight_decay_kind="l2")
        stage.optimizer.update(exclude="none")
        stage.schedule.update(learning_rate=0.03)
        stage.augment.update(name="sim_augment", crop_area=(0.2, 1.0), jitter=0.5, blur=0.5)
        stage.augment.update(jitter_form="torchvision")
    config.linear.update(batch_size=256, epochs=100.0, warmup_epochs=0.0)
    config.linear.objective.update(label_smoothing=0.0)
    config.linear.optimizer.update(name="sgd", weight_decay=0.0)
    config.linear.schedule.update(name="step", learning_rate=30.0, boundaries=(60.0, 80.0))
    config.linear.schedule.update(decay_rate=0.1)
    config.linear.augment.update(name="crop_flip")
    return config
