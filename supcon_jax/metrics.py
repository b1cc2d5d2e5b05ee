"""What makes a contrastive loss readable: its value for a collapsed encoder, its floor, matches."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from supcon_jax import losses
from supcon_jax.losses.arguments import BlockSize
from supcon_jax.losses.pairs import AxisName, ContrastMode, DenominatorMode, Exchange, axis_size

PerExample = Float[Array, " b"]
Metrics = dict[str, tuple[PerExample, PerExample]]  # name -> values and their weights


def contrastive_metrics(
    values: PerExample,
    outputs: Float[Array, "b v k"],
    labels: Array | None,
    *,
    loss: str,
    temperature: float,
    contrast_mode: ContrastMode,
    denominator_mode: DenominatorMode,
    positives_cap: int | None,
    queue: Any,
    exchange: Exchange,
    block_size: BlockSize,
    axis_name: AxisName | None,
) -> tuple[PerExample, Metrics]:
    """Weights of the samples, 0 where there is nothing to compare, and the metrics with theirs.

    A sample counts if it has a positive; in a triplet and with "only_negatives", whose denominator
    would be empty, if it has a negative too.

    The metrics are `collapsed` (the loss of a collapsed encoder), `floor`, `excess` over it (not of
    a loss that was added, for which they are not known), `contrastive_accuracy` (in the batch; not
    for a ring, which has no global features), with labels `lonely` (share of samples without a
    positive from another one), with a queue `queue_filled`. The arguments are those of
    `objectives.contrastive`.
    """
    batch, views, _ = outputs.shape
    count = partial(losses.num_positives, outputs, labels, queue=queue, axis_name=axis_name)
    same = count()
    positives = same if positives_cap is None else count(positives_cap=positives_cap)
    everything = axis_size(axis_name) * batch * views - 1 + (0 if queue is None else queue[2].sum())
    negatives = everything - same
    counts = positives > 0
    if loss == "triplet" or denominator_mode == "only_negatives":
        counts &= negatives > 0
    weights = counts.astype(values.dtype)
    metrics: dict[str, PerExample] = {}
    if loss == "triplet":  # a hinge: 0 at best, and its margin where all distances are 0
        metrics = {"collapsed": jnp.full_like(values, 2 * temperature), "excess": values}
    elif loss in ("supcon", "supcon_in"):
        others = positives + negatives
        metrics = {"collapsed": losses.uniform_value(positives, others, denominator_mode)}
        if denominator_mode != "only_negatives":  # which has no floor
            metrics["floor"] = losses.floor(positives, denominator_mode)
            metrics["excess"] = losses.excess(values, positives, denominator_mode)
    if exchange == "gather":
        metrics["contrastive_accuracy"] = losses.contrastive_accuracy(
            outputs,
            labels,
            contrast_mode=contrast_mode,
            axis_name=axis_name,
            block_size=block_size,
        )
    weighted = {name: (value, weights) for name, value in metrics.items()}
    if queue is not None:
        weighted["queue_filled"] = (jnp.full_like(weights, queue[2].mean()), jnp.ones_like(weights))
    if labels is not None:
        lonely = (same == views - 1).astype(values.dtype)
        weighted["lonely"] = (lonely, jnp.ones_like(lonely))
    return weights, weighted
