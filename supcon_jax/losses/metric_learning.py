"""The losses that the paper compares with: NT-Xent, N-pairs, triplet, large-margin softmax."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

from supcon_jax.losses.arguments import (
    BlockSize,
    check_margin,
    check_temperature,
    class_ids,
    with_views,
)
from supcon_jax.losses.pairs import (
    AxisName,
    Exchange,
    Features,
    Labels,
    arrange,
    precision_of,
    products,
    relate,
)
from supcon_jax.losses.supcon import Losses, supcon_loss


def nt_xent_loss(
    features: Float[Array, "batch views dim"],
    *,
    temperature: float | Num[Array, ""] = 0.5,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Self-supervised NT-Xent (SimCLR): the other views of a sample are its only positives (Eq. 1).

    loss_i = -log( exp(s_ij(i)) / sum_{a in A(i)} exp(s_ia) ), with j(i) the other view of i; the
    mean over the other views where there are more than two.

    Args:
      features: `[batch, views, dim]` with two views or more, normalised.
      temperature: as in `supcon_loss`.
      axis_name: as in `supcon_loss`.
      exchange: as in `supcon_loss`.
      block_size: as in `supcon_loss`.
      precision: as in `supcon_loss`.

    Returns:
      One loss a sample, `[batch]`.

    Raises:
      ValueError: fewer than two views, and as `supcon_loss`.

    References:
      Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709.
    """
    if with_views(features).shape[1] < 2:
        raise ValueError(
            f"NT-Xent needs [batch, views, dim] with 2 views or more, got {features.shape}"
        )
    return supcon_loss(
        features,
        temperature=temperature,
        axis_name=axis_name,
        exchange=exchange,
        block_size=block_size,
        precision=precision,
    )


def n_pairs_loss(
    features: Features,
    labels: Labels,
    *,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """N-pairs: one view of each sample, one other sample of its class as the positive.

    loss_i = -log( exp(z_i . z_p) / (exp(z_i . z_p) + sum_{n in N(i)} exp(z_i . z_n)) ), with p the
    first other sample of the class in the global batch: `supcon_loss` at temperature 1 with
    `positives_cap=1` (Eq. 27). Further samples of the class are left out.

    Args:
      features: `[batch, dim]` or `[batch, 1, dim]`.
      labels: `[batch]` class ids.
      axis_name: as in `supcon_loss`.
      exchange: as in `supcon_loss`.
      block_size: as in `supcon_loss`.
      precision: as in `supcon_loss`.

    Returns:
      One loss a sample, `[batch]`; 0 for the only sample of its class.

    Raises:
      ValueError: more than one view, no labels, and as `supcon_loss`.

    References:
      Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, 2016; as in
      Khosla et al., 2020, https://arxiv.org/abs/2004.11362, supplement.
    """
    if with_views(features).shape[1] > 1:
        raise ValueError(f"N-pairs takes one view: [batch, dim], got {features.shape}")
    return supcon_loss(
        features,
        class_ids(len(features), labels),
        temperature=1.0,
        positives_cap=1,
        axis_name=axis_name,
        exchange=exchange,
        block_size=block_size,
        precision=precision,
    )


def triplet_loss(
    features: Features,
    labels: Labels,
    *,
    temperature: float | Num[Array, ""] = 0.1,
    axis_name: AxisName | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Triplet loss over all triplets of the global batch, with the margin that SupCon tends to.

    loss_i = mean of max(0, |z_i - z_p|^2 - |z_i - z_n|^2 + 2 temperature) over P(i) and N(i),
    averaged over the views of each sample. It takes O(N log N) time an anchor, not one term a
    triplet: negatives are sorted, and each positive meets the sum of those that are too close.
    All pairs are held at once.
    With classes of equal size, the mean of the result is that over all triplets.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`, normalised.
      labels: `[batch]` class ids.
      temperature: half of the margin; the paper's expansion of its loss for one positive and one
        negative ends in 2 temperature.
      axis_name: mapped axis that the batch is split over.
      precision: as in `supcon_loss`.

    Returns:
      One loss a sample, `[batch]`; 0 for an anchor without positives or negatives.

    Raises:
      ValueError: wrong ranks or sizes, no labels, non-positive temperature.

    References:
      Weinberger and Saul, 2009; Khosla et al., 2020, https://arxiv.org/abs/2004.11362, supplement
      (the relation to SupCon).
    """
    features = with_views(features)
    batch = len(features)
    labels = class_ids(batch, labels)
    check_temperature(temperature)
    anchors, contrast = arrange(
        features,
        labels,
        contrast_mode="all",
        positives_cap=None,
        axis_name=axis_name,
        exchange="gather",
    )
    similarities = products(anchors.features, contrast.features, precision_of(precision, features))
    wide = similarities.dtype
    relation = relate(anchors.ids, contrast.ids, None, None, wide)
    lengths = jnp.sum(jnp.square(contrast.features.astype(wide)), -1)
    nearness = lengths[None] - 2 * similarities  # |z_i - z_a|^2 less |z_i|^2, which cancels
    margin = 2 * jnp.asarray(temperature, wide)
    values = jax.vmap(_over_triplets)(
        nearness + margin, relation.positive, nearness, relation.negative
    )
    return values.reshape(batch, -1).mean(-1)


def _over_triplets(
    a: Float[Array, " rows"],
    positive: Bool[Array, " rows"],
    b: Float[Array, " rows"],
    negative: Bool[Array, " rows"],
) -> Float[Array, ""]:
    """Mean of max(0, a_p - b_n) over the positives p and negatives n of an anchor."""
    in_order = jnp.sort(jnp.where(negative, b, jnp.inf))
    sums = jnp.cumsum(jnp.where(jnp.isfinite(in_order), in_order, 0))
    smaller = jnp.searchsorted(in_order, jax.lax.stop_gradient(a))
    of_smaller = jnp.where(smaller > 0, sums[smaller - 1], 0)
    total = jnp.sum(jnp.where(positive, smaller * a - of_smaller, 0))
    return total / jnp.maximum(positive.sum() * negative.sum(), 1)


def large_margin_softmax(
    features: Float[Array, "batch dim"],
    class_weights: Float[Array, "classes dim"],
    labels: Labels,
    margin: int = 4,
) -> Float[Array, " batch"]:
    """Large-margin softmax (L-Softmax): cross-entropy whose own class must win by an angle.

    With t_j the angle between features x and class weights w_j, the logits are |w_j| |x| cos(t_j),
    that of the own class y is |w_y| |x| psi(t_y) with

        psi(t) = (-1)^k cos(margin t) - 2k    for t in [k pi / margin, (k + 1) pi / margin]

    which falls from 1 to 1 - 2 margin and is never above cos(t). Margin 1 is softmax cross-entropy.

    Args:
      features: `[batch, dim]`, not normalised; a sample of length 0 has logits 0.
      class_weights: `[classes, dim]` of the last linear layer, which has no bias.
      labels: `[batch]` class ids in [0, classes).
      margin: integer >= 1.

    Returns:
      One loss a sample, `[batch]`, float32 (float64 for float64 input).

    Raises:
      ValueError: wrong shapes, or a margin that is no positive integer.

    References:
      Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, 2016,
      https://arxiv.org/abs/1612.02295, Eq. 6.
    """
    check_margin(features, class_weights, margin)
    labels = class_ids(len(features), labels)
    wide = jnp.promote_types(jnp.result_type(features, class_weights), jnp.float32)
    x, w = features.astype(wide), class_weights.astype(wide)
    squared = jnp.sum(x * x, -1, keepdims=True) * jnp.sum(w * w, -1)[None]
    logits = with_margin(products(x, w, precision_of(None, x)), squared, labels, margin)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - own


def with_margin(
    logits: Float[Array, "*batch classes"],
    squared: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    margin: int,
    share: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*batch classes"]:
    """Logits whose own class has a margin, see `large_margin_softmax`.

    A network that starts with the whole margin makes its features short instead of telling classes
    apart. With a share that grows from 0 to 1 it does not: (1 - share) / share is the lambda of the
    paper's section 4.2, which falls.

    Args:
      logits: x . w_j.
      squared: |x|^2 |w_j|^2.
      labels: class ids in [0, classes).
      margin: integer >= 1.
      share: of the margin, from 0 (none) to 1.

    Returns:
      The logits, for the own class y with |x| |w_y| (share psi(t_y) + (1 - share) cos(t_y)).
    """
    own, of_own = (jnp.take_along_axis(a, labels[..., None], -1)[..., 0] for a in (logits, squared))
    lengths = jnp.sqrt(jnp.where(of_own > 0, of_own, 1))
    harder = jnp.where(of_own > 0, lengths * _psi(own / lengths, margin), 0)
    harder = share * harder + (1 - share) * own
    is_own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.where(is_own, harder[..., None], logits)


def _psi(cosine: Array, margin: int) -> Array:
    """psi of the angle: cos(margin t) is the Chebyshev polynomial of cos(t), smooth at t = 0."""
    before, now = jnp.ones_like(cosine), cosine
    for _ in range(margin - 1):
        before, now = now, 2 * cosine * now - before
    ends = np.cos(np.pi * np.arange(1, margin) / margin)
    k = sum((cosine < end).astype(jnp.int32) for end in ends)
    return jnp.where(k % 2 == 0, now, -now) - 2 * k
