"""What makes the value of a contrastive loss readable: where it starts, how low it can go."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from supcon_jax.losses.arguments import check_choice, check_labels, with_views
from supcon_jax.losses.pairs import (
    ContrastMode,
    DenominatorMode,
    Features,
    Labels,
    arrange,
    precision_of,
    products,
    relate,
)

Counts = Int[Array, " batch"]


def uniform_value(
    positives: Counts, others: int, denominator_mode: DenominatorMode = "all"
) -> Float[Array, " batch"]:
    """Loss of an encoder that maps everything to one point: nothing has been learned at this value.

    ln|A(i)| for "all", ln(1 + |N(i)|) for "one_positive", ln|N(i)| for "only_negatives"; the same
    for Eq. 2 and Eq. 3 and for every temperature. 0 for an anchor that does not count.

    Args:
      positives: `[batch]`, |P(i)| of each anchor (`num_positives`).
      others: |A(i)|, views in the global batch minus one.
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


def contrastive_accuracy(
    features: Features,
    labels: Labels | None = None,
    *,
    contrast_mode: ContrastMode = "all",
    axis_name: str | None = None,
) -> Float[Array, " batch"]:
    """How often the most similar other view in the global batch is a positive.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`, normalised.
      labels: `[batch]` class ids, or None (every sample a class of its own).
      contrast_mode: "all" views are anchors, or only the first ("one").
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch]` in [0, 1]: the share of a sample's anchor views. A tie counts as a miss.

    Raises:
      ValueError: as `supcon_loss`.
    """
    features = with_views(features)
    batch, _, _ = features.shape
    check_choice("contrast_mode", contrast_mode, ContrastMode)
    check_labels(batch, labels)
    anchors, contrast = arrange(
        features,
        labels,
        contrast_mode=contrast_mode,
        positives_cap=None,
        axis_name=axis_name,
        exchange="gather",
    )
    relation = relate(anchors.ids, contrast.ids, None, None, jnp.float32)
    similarities = products(anchors.features, contrast.features, precision_of(None, features))
    hits = _largest(similarities, relation.positive) > _largest(similarities, relation.negative)
    return hits.reshape(batch, -1).mean(-1)


def _largest(x: Array, where: Bool[Array, "..."]) -> Array:
    return jnp.max(x, axis=-1, where=where, initial=-jnp.inf)
