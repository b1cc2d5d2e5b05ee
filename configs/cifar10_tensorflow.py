"""CIFAR-10, ResNet-50, as the authors' TensorFlow code trains it.

    python -m supcon_jax.train --config configs/cifar10_tensorflow.py

Not the source of the paper's numbers (configs/cifar10.py is): that code's README says that it
"slightly underperforms" on CIFAR-10. Batch 4,096 (SimCLR and cross-entropy 1,024), SGD with
momentum at 8.0 (2.0; Nesterov at 0.4), loss times the temperature for SupCon alone, SimAugment of
strength 0.5 without blur in every stage. Values: google-research/supcon, scripts/
{supcon,simclr,cross_entropy}_cifar10_resnet50.sh in their last version.
Published hardware: 32 TPU v3 cores. Accuracy here: not yet run.
"""

from ml_collections import ConfigDict

from supcon_jax.config import base
from supcon_jax.data.datasets import dataset


def get_config(recipe: str = "supcon") -> ConfigDict:
    config = base(recipe)
    # That code subtracts (-0.0172, -0.0356, -0.107) and divides by (0.4046, 0.3988, 0.402) on
    # pixels in [-1, 1].
    config.data.update(dataset("cifar10"), holdout=0.0)
    config.data.update(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.201))
    config.model.update(depth=50, batch_norm="local" if recipe == "supcon" else "global")
    for name in ("supcon", "simclr", "linear", "cross_entropy"):
        config[name].optimizer.update(exclude="norm")

    config.supcon.update(batch_size=4096, epochs=1000.0, warmup_epochs=10.0, loss_scale=0.1)
    config.supcon.head.update(layers=(2048, 128), kernel_init="normal_0.01")
    config.supcon.schedule.update(learning_rate=0.5 * 4096 / 256)

    config.simclr.update(batch_size=1024, epochs=400.0, warmup_epochs=10.0)
    config.simclr.head.update(layers=(2048, 2048, 128), batch_norm=True, kernel_init="normal_0.01")
    config.simclr.schedule.update(learning_rate=0.5 * 1024 / 256)

    config.linear.update(batch_size=4096, epochs=100.0)
    config.linear.head.update(kernel_init="glorot_uniform")
    config.linear.optimizer.update(weight_decay=0.0)
    config.linear.schedule.update(name="step", learning_rate=2.5 * 4096 / 256)
    config.linear.schedule.update(decay_rate=0.2, boundaries=(60.0, 75.0, 90.0))
    if recipe == "simclr":
        config.linear.update(batch_size=1024, epochs=90.0)
        config.linear.head.update(kernel_init="zeros")
        config.linear.schedule.update(name="cosine", learning_rate=0.25 * 1024 / 256)

    config.cross_entropy.update(batch_size=1024, epochs=1000.0, warmup_epochs=12.0)
    config.cross_entropy.head.update(kernel_init="glorot_uniform")
    config.cross_entropy.optimizer.update(name="nesterov", weight_decay=5e-4)
    config.cross_entropy.schedule.update(learning_rate=0.1 * 1024 / 256)
    return config
