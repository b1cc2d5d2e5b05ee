"""What makes the value of a contrastive loss readable: where it starts, how low it can go."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from supcon_jax.losses.arguments import (
    BlockSize,
    check_choice,
    check_labels,
    check_queue,
    choose_block_size,
    kept_samples,
    mask_weights,
    with_views,
)
from supcon_jax.losses.blockwise import blocks
from supcon_jax.losses.pairs import (
    AxisName,
    ContrastMode,
    DenominatorMode,
    Features,
    Labels,
    Mask,
    Queue,
    Relation,
    Rows,
    arrange,
    gather,
    of_class,
    precision_of,
    products,
    relate,
)

Counts = Int[Array, " batch"]


def num_positives(
    features: Shaped[Array, "batch ..."],
    labels: Labels | None = None,
    *,
    positives_cap: int | None = None,
    mask: Mask | None = None,
    queue: Queue | None = None,
    axis_name: AxisName | None = None,
) -> Int[Array, " batch"]:
    """|P(i)|: how many positives each anchor view of a sample has in the contrast set.

    The number is the same for all views of a sample: views x (samples of its class) - 1, without a
    cap, a mask or a queue.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`; only the shape is used.
      labels: `[batch]` class ids, or None (every sample a class of its own).
      positives_cap: as in `supcon_loss`.
      mask: as in `supcon_loss`.
      queue: as in `supcon_loss`.
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch]` int32.

    Raises:
      ValueError: as `supcon_loss`.
    """
    features = with_views(features)
    batch, views, _ = features.shape
    labels = check_labels(batch, labels)
    kept = kept_samples(positives_cap, views)
    weights = mask_weights(mask, labels, batch, positives_cap, "gather", axis_name)
    check_queue(queue, features, positives_cap)
    if weights is not None:
        positive = weights.of_samples > 0
        own = positive[jnp.arange(batch), weights.first + jnp.arange(batch)]
        return views * positive.sum(1, dtype=jnp.int32) - own
    if labels is None:
        return jnp.full(batch, views - 1, jnp.int32)
    others = (labels[:, None] == gather(labels, axis_name)[None]).sum(1, dtype=jnp.int32) - 1
    if kept is not None:
        others = jnp.minimum(others, kept)
    counts = views * (others + 1) - 1
    if queue is not None:
        _, of_queue, valid = map(jnp.asarray, queue)
        counts += ((labels[:, None] == of_queue[None]) & valid[None]).sum(1, dtype=jnp.int32)
    return counts


def uniform_value(
    positives: Counts, others: int | Counts, denominator_mode: DenominatorMode = "all"
) -> Float[Array, " batch"]:
    """Loss of an encoder that maps everything to one point: nothing has been learned at this value.

    ln|A(i)| for "all", ln(1 + |N(i)|) for "one_positive", ln|N(i)| for "only_negatives"; the same
    for Eq. 2 and Eq. 3 and for every temperature. 0 for an anchor that does not count.

    Args:
      positives: `[batch]`, |P(i)| of each anchor (`num_positives`).
      others: |A(i)|, a number or one for each anchor: views in the global batch minus one, plus the
        valid rows of a queue, minus what a cap leaves out.
      denominator_mode: as in `supcon_loss`.

    Returns:
      `[batch]` in nats.

    Raises:
      ValueError: unknown mode.
    """
    check_choice("denominator_mode", denominator_mode, DenominatorMode)
    sizes = {
        "all": jnp.full_like(positives, others),
        "one_positive": 1 + others - positives,
        "only_negatives": others - positives,
    }
    return jnp.log(jnp.where(positives > 0, jnp.maximum(sizes[denominator_mode], 1), 1))


def floor(positives: Counts, denominator_mode: DenominatorMode = "all") -> Float[Array, " batch"]:
    """Lowest value that the loss of an anchor can approach, whatever the encoder and temperature.

    ln|P(i)| for "all" (by Jensen's inequality, with no negative left in the denominator), 0 for
    "one_positive"; "only_negatives" has no floor: minus infinity.

    Args:
      positives: `[batch]`, |P(i)| of each anchor (`num_positives`).
      denominator_mode: as in `supcon_loss`.

    Returns:
      `[batch]` in nats; 0 for an anchor without positives.

    Raises:
      ValueError: unknown mode.

    References:
      Khosla et al., 2020, https://arxiv.org/abs/2004.11362, Eq. 2 and 3.
    """
    check_choice("denominator_mode", denominator_mode, DenominatorMode)
    lowest = {
        "all": jnp.log(jnp.maximum(positives, 1)),
        "one_positive": jnp.zeros(positives.shape),
        "only_negatives": jnp.full(positives.shape, -jnp.inf),
    }[denominator_mode]
    return jnp.where(positives > 0, lowest, 0.0)


def excess(
    losses: Float[Array, " batch"], positives: Counts, denominator_mode: DenominatorMode = "all"
) -> Float[Array, " batch"]:
    """What a loss has left to lose: the loss minus its `floor`.

    Args:
      losses: `[batch]`, of `supcon_loss` or `supcon_in_loss`.
      positives: `[batch]`, |P(i)| of each anchor (`num_positives`).
      denominator_mode: as in `supcon_loss`; "only_negatives" has no floor.

    Returns:
      `[batch]` in nats, >= 0.

    Raises:
      ValueError: unknown mode, or "only_negatives".
    """
    if denominator_mode == "only_negatives":
        raise ValueError("denominator_mode 'only_negatives' has no floor that a loss could exceed")
    return losses - floor(positives, denominator_mode)


def contrastive_accuracy(
    features: Features,
    labels: Labels | None = None,
    *,
    contrast_mode: ContrastMode = "all",
    axis_name: AxisName | None = None,
    block_size: BlockSize = None,
) -> Float[Array, " batch"]:
    """How often the most similar other view in the global batch is a positive.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`, normalised.
      labels: `[batch]` class ids, or None (every sample a class of its own).
      contrast_mode: "all" views are anchors, or only the first ("one").
      axis_name: mapped axis that the batch is split over.
      block_size: as in `supcon_loss`.

    Returns:
      `[batch]` in [0, 1]: the share of a sample's anchor views. A tie counts as a miss.

    Raises:
      ValueError: as `supcon_loss`.
    """
    features = with_views(features)
    anchors, contrast = _both(features, labels, contrast_mode, axis_name)

    def add(nearest: tuple[Array, Array], pairs: Pairs) -> tuple[Array, Array]:
        sets = pairs.relation.positive, pairs.relation.negative
        largest = [jnp.max(pairs.products, 1, where=where, initial=-jnp.inf) for where in sets]
        return jnp.maximum(nearest[0], largest[0]), jnp.maximum(nearest[1], largest[1])

    nearest = (-jnp.inf, -jnp.inf)
    positive, negative = _over_pairs(add, nearest, anchors, contrast, block_size)
    return (positive > negative).reshape(len(features), -1).mean(-1)


def alignment(
    features: Features, labels: Labels | None = None, *, axis_name: AxisName | None = None
) -> Float[Array, " batch"]:
    """How far apart positives are: mean of |z_i - z_p|^2 over P(i), averaged over the views.

    0 where all positives lie on one point, 2 for positives at right angles. It takes O(N dim).

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`, normalised.
      labels: `[batch]` class ids, or None (every sample a class of its own).
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch]`; 0 for an anchor without positives.

    Raises:
      ValueError: as `supcon_loss`.

    References:
      Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
      Uniformity on the Hypersphere, 2020, https://arxiv.org/abs/2005.10242, with alpha = 2.
    """
    features = with_views(features)
    anchors, contrast = _both(features, labels, "all", axis_name)
    wide = jnp.promote_types(features.dtype, jnp.float32)
    z = contrast.features.astype(wide)
    squared = jnp.sum(z * z, -1)
    positives, sums, squares = (
        of_class(contrast.ids.label, x) - x for x in (jnp.ones_like(squared), z, squared)
    )
    mean_square = squares - 2 * jnp.sum(z * sums, -1)
    values = jnp.where(positives > 0, squared + mean_square / jnp.maximum(positives, 1), 0)
    return values[anchors.ids.entry].reshape(len(features), -1).mean(-1)


def uniformity(
    features: Features,
    *,
    t: float = 2.0,
    axis_name: AxisName | None = None,
    block_size: BlockSize = None,
) -> Float[Array, ""]:
    """How evenly the features cover the sphere: log mean exp(-t |z_i - z_j|^2) over all i != j.

    0 for a collapsed encoder, about -2t for features spread evenly over many dimensions.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`, normalised.
      t: steepness > 0.
      axis_name: mapped axis that the batch is split over.
      block_size: as in `supcon_loss`.

    Returns:
      A number for the global batch, the same on all devices; 0 for a single view.

    Raises:
      ValueError: wrong rank.

    References:
      Wang and Isola, 2020, https://arxiv.org/abs/2005.10242.
    """
    features = with_views(features)
    anchors, contrast = _both(features, None, "all", axis_name)

    def add(total: Array, pairs: Pairs) -> Array:
        lengths = pairs.mine[:, None] + pairs.theirs[None]
        near = jnp.exp(-t * jnp.maximum(lengths - 2 * pairs.products, 0))
        used = pairs.relation.positive | pairs.relation.negative
        return total + jnp.sum(jnp.where(used, near, 0), 1)

    total = _over_pairs(add, 0.0, anchors, contrast, block_size).sum()
    pairs = len(contrast.features) * (len(contrast.features) - 1)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return jnp.log(total / pairs) if pairs else total


def _both(
    features: Array, labels: Array | None, contrast_mode: ContrastMode, axis_name: AxisName | None
) -> tuple[Rows, Rows]:
    """The anchors of this device and the contrast set of all, checked."""
    check_choice("contrast_mode", contrast_mode, ContrastMode)
    return arrange(
        features,
        check_labels(len(features), labels),
        contrast_mode=contrast_mode,
        positives_cap=None,
        axis_name=axis_name,
        exchange="gather",
    )


class Pairs(NamedTuple):
    """A block of anchors with a block of the contrast set."""

    products: Float[Array, "anchors contrast"]
    relation: Relation
    mine: Float[Array, " anchors"]  # squared lengths
    theirs: Float[Array, " contrast"]


def _over_pairs(
    add: Callable[[Any, Pairs], Any],
    start: Any,
    anchors: Rows,
    contrast: Rows,
    block_size: BlockSize,
) -> Any:
    """Fold `add` over blocks of pairs; what it gathers is one value an anchor."""
    rows = len(anchors.features)
    size = choose_block_size(block_size, anchors, contrast, None, "gather")
    size = size or len(contrast.features)
    precision = precision_of(None, anchors.features)
    dtype = jnp.promote_types(anchors.features.dtype, jnp.float32)
    of_contrast = blocks(size, contrast)

    def squared(x: Array) -> Array:
        return jnp.sum(jnp.square(x.astype(dtype)), 1)

    def of_anchors(mine: Rows) -> Any:
        def with_contrast(gathered: Any, theirs: Rows) -> tuple[Any, None]:
            pairs = Pairs(
                products(mine.features, theirs.features, precision),
                relate(mine.ids, theirs.ids, None, None, dtype),
                squared(mine.features),
                squared(theirs.features),
            )
            return add(gathered, pairs), None

        nothing = jnp.zeros_like(squared(mine.features))
        begin = jax.tree.map(lambda value: nothing + value, start)
        return jax.lax.scan(with_contrast, begin, of_contrast)[0]

    by_blocks = jax.lax.map(of_anchors, blocks(min(size, rows), anchors))
    return jax.tree.map(lambda x: x.reshape(-1)[:rows], by_blocks)
