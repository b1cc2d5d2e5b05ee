"""What makes a contrastive loss readable: its value for a collapsed encoder, its floor, matches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from supcon_jax import losses
from supcon_jax.losses.arguments import BlockSize
from supcon_jax.losses.pairs import ContrastMode, DenominatorMode, Exchange

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
    axis_name: str | None,
) -> tuple[PerExample, Metrics]:
    """Weights of the samples, 0 where there is no positive, and the metrics with theirs.

    The metrics are `collapsed` (the loss of a collapsed encoder), `floor`, `excess` over it (not of
    a loss that was added, for which they are not known), `contrastive_accuracy` (in the batch; not
    for a ring, which has no global features), with labels `lonely` (share of samples without a
    positive from another one), with a queue `queue_filled`. The arguments are those of
    `objectives.contrastive`.
    """
    count = partial(losses.num_positives, outputs, labels, queue=queue, axis_name=axis_name)
    positives, same = count(positives_cap=positives_cap), count()
    weights = (positives > 0).astype(values.dtype)
    metrics: dict[str, PerExample] = {}
    if loss == "triplet":  # a hinge: 0 at best, and its margin where all distances are 0
        metrics = {"collapsed": jnp.full_like(values, 2 * temperature), "excess": values}
    elif loss in ("supcon", "supcon_in"):
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        others = devices * outputs.shape[0] * outputs.shape[1] - 1 - (same - positives)
        others = others if queue is None else others + queue[2].sum()
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
        lonely = (same == outputs.shape[1] - 1).astype(values.dtype)
        weighted["lonely"] = (lonely, jnp.ones_like(lonely))
    return weights, weighted
