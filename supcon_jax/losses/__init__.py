"""Losses of arrays: pure, jit-able, exact on any number of devices."""

from supcon_jax.losses.diagnostics import (
    alignment,
    contrastive_accuracy,
    excess,
    floor,
    num_positives,
    uniform_value,
    uniformity,
)
from supcon_jax.losses.masks import jaccard_mask, overlap_mask, similarity_mask
from supcon_jax.losses.metric_learning import (
    large_margin_softmax,
    n_pairs_loss,
    nt_xent_loss,
    triplet_loss,
    with_margin,
)
from supcon_jax.losses.normalize import l2_normalize
from supcon_jax.losses.supcon import supcon_in_loss, supcon_loss
from supcon_jax.losses.variants import epsilon_sup_infonce_loss, hard_negative_loss

__all__ = [
    "alignment",
    "contrastive_accuracy",
    "epsilon_sup_infonce_loss",
    "excess",
    "floor",
    "hard_negative_loss",
    "jaccard_mask",
    "l2_normalize",
    "large_margin_softmax",
    "n_pairs_loss",
    "nt_xent_loss",
    "num_positives",
    "overlap_mask",
    "similarity_mask",
    "supcon_in_loss",
    "supcon_loss",
    "triplet_loss",
    "uniform_value",
    "uniformity",
    "with_margin",
]
