"""Supervised contrastive learning in JAX. Importing this loads jax and nothing heavier."""

from supcon_jax.losses import (
    contrastive_accuracy,
    floor,
    l2_normalize,
    num_positives,
    supcon_in_loss,
    supcon_loss,
    uniform_value,
)

__version__ = "0.1.0"

__all__ = [
    "contrastive_accuracy",
    "floor",
    "l2_normalize",
    "num_positives",
    "supcon_in_loss",
    "supcon_loss",
    "uniform_value",
]
