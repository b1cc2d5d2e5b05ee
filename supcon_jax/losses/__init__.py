"""Losses of arrays: pure, jit-able, exact on any number of devices."""

from supcon_jax.losses.diagnostics import contrastive_accuracy, floor, uniform_value
from supcon_jax.losses.supcon import l2_normalize, num_positives, supcon_in_loss, supcon_loss

__all__ = [
    "contrastive_accuracy",
    "floor",
    "l2_normalize",
    "num_positives",
    "supcon_in_loss",
    "supcon_loss",
    "uniform_value",
]
