"""Masks for `supcon_loss(mask=...)`: how much the samples are positives of each other.

Rows are the samples of this device, columns those of all devices. A sample's own other views have
weight 1 always. The masks are constants to the losses: no gradient passes through them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from supcon_jax.losses.arguments import check_targets
from supcon_jax.losses.pairs import AxisName, first_sample, gather

Mask = Float[Array, "batch global_batch"]


def overlap_mask(
    labels: Num[Array, "batch classes"] | Bool[Array, "batch classes"],
    *,
    axis_name: AxisName | None = None,
) -> Mask:
    """1 where two samples share at least one class, else 0.

    Args:
      labels: `[batch, classes]`, above 0 for the classes that a sample has (multi-hot).
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch, global_batch]` in {0, 1}.

    Raises:
      ValueError: labels of another rank.
    """
    mine, theirs = _multi_hot(labels, axis_name)
    return _with_own_views(jnp.minimum(mine @ theirs.T, 1), axis_name)


def jaccard_mask(
    labels: Num[Array, "batch classes"] | Bool[Array, "batch classes"],
    *,
    axis_name: AxisName | None = None,
) -> Mask:
    """Classes that two samples share, as a part of those that either has: |A and B| / |A or B|.

    Args:
      labels: `[batch, classes]`, above 0 for the classes that a sample has (multi-hot).
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch, global_batch]` in [0, 1].

    Raises:
      ValueError: labels of another rank.
    """
    mine, theirs = _multi_hot(labels, axis_name)
    shared = mine @ theirs.T
    either = mine.sum(1)[:, None] + theirs.sum(1)[None] - shared
    return _with_own_views(shared / jnp.maximum(either, 1), axis_name)


def similarity_mask(
    labels: Float[Array, "batch classes"], *, axis_name: AxisName | None = None
) -> Mask:
    """Cosine of two samples' soft labels, as mixup, CutMix, smoothing or a teacher make them.

    Equal to class membership for one-hot labels.

    Args:
      labels: `[batch, classes]` >= 0, of any sum.
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch, global_batch]` in [0, 1].

    Raises:
      ValueError: labels of another rank.

    References:
      Label similarity in the place of equality: Kim et al., A Generalized Supervised Contrastive
      Learning Framework, 2022, https://arxiv.org/abs/2206.00384.
    """
    labels = check_targets(labels)
    length = jnp.sqrt(jnp.sum(labels * labels, axis=1, keepdims=True))
    mine = labels / jnp.where(length > 0, length, 1)
    return _with_own_views(jnp.clip(mine @ gather(mine, axis_name).T, 0, 1), axis_name)


def _multi_hot(labels: Array, axis_name: AxisName | None) -> tuple[Array, Array]:
    mine = (check_targets(labels) > 0).astype(jnp.float32)
    return mine, gather(mine, axis_name)


def _with_own_views(mask: Array, axis_name: AxisName | None) -> Mask:
    samples = jnp.arange(len(mask))
    return mask.at[samples, samples + first_sample(len(mask), axis_name)].set(1)
