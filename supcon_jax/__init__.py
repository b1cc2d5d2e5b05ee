"""Supervised contrastive learning in JAX. Importing this loads jax and nothing heavier."""

from supcon_jax.losses import (
    alignment,
    contrastive_accuracy,
    epsilon_sup_infonce_loss,
    excess,
    floor,
    hard_negative_loss,
    jaccard_mask,
    l2_normalize,
    large_margin_softmax,
    n_pairs_loss,
    nt_xent_loss,
    num_positives,
    overlap_mask,
    similarity_mask,
    supcon_in_loss,
    supcon_loss,
    triplet_loss,
    uniform_value,
    uniformity,
)

__version__ = "0.1.0"

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
]
