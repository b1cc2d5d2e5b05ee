"""Objectives: what a stage minimises, as functions of the outputs and the batch.

Every objective is `(outputs [b, v, k], batch, aux) -> (losses [b], weights [b], metrics)`; the step
averages the losses by their weights over all devices, and each metric by its own weights.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from supcon_jax import losses, momentum
from supcon_jax.losses.arguments import BlockSize
from supcon_jax.losses.pairs import ContrastMode, DenominatorMode, Exchange

PerExample = Float[Array, " b"]
Metrics = dict[str, tuple[PerExample, PerExample]]  # name -> values and their weights
Objective = Callable[[Array, Mapping[str, Array], Any], tuple[PerExample, PerExample, Metrics]]

LOSSES = {"supcon": losses.supcon_loss, "supcon_in": losses.supcon_in_loss}


def contrastive(
    outputs: Float[Array, "b v k"],
    batch: Mapping[str, Array],
    aux: Any,
    *,
    loss: Literal["supcon", "supcon_in"] = "supcon",
    use_labels: bool = True,
    temperature: float = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "all",
    positives_cap: int = -1,
    exchange: Exchange = "gather",
    block_size: int = 0,
    axis_name: str | None = None,
) -> tuple[PerExample, PerExample, Metrics]:
    """A contrastive loss of normalised projections, supervised or (without labels) not.

    Args:
      outputs: `[b, v, k]`, normalised.
      batch: with "label" `[b]`.
      aux: the state's; its "queue", where there is one, is contrasted with too, see `momentum`.
      loss: name in `LOSSES`.
      use_labels: False drops the labels (SimCLR).
      temperature: see `losses.supcon_loss`.
      contrast_mode: see there.
      denominator_mode: see there.
      positives_cap: see there; -1: all.
      exchange: see there.
      block_size: see there; 0: "auto".
      axis_name: mapped axis that the batch is split over.

    Returns:
      Losses `[b]`; weights `[b]`, 0 where there is no positive; and the metrics that make the loss
      readable: `collapsed` (its value for a collapsed encoder), `floor`, `excess` over the floor,
      `contrastive_accuracy` (in the batch; not for a ring, which has no global features), with
      labels `lonely` (share of samples without a positive from another one) and `queue_filled`.
    """
    labels = batch["label"] if use_labels else None
    cap = None if positives_cap < 0 else positives_cap
    blocks: BlockSize = block_size or "auto"
    queue = momentum.rows(aux["queue"]) if "queue" in aux else None
    values = LOSSES[loss](
        outputs,
        labels,
        temperature=temperature,
        contrast_mode=contrast_mode,
        denominator_mode=denominator_mode,
        positives_cap=cap,
        queue=queue,
        exchange=exchange,
        block_size=blocks,
        axis_name=axis_name,
    )
    count = partial(losses.num_positives, outputs, labels, queue=queue, axis_name=axis_name)
    positives, same = count(positives_cap=cap), count()
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    others = devices * outputs.shape[0] * outputs.shape[1] - 1 - (same - positives)
    others = others if queue is None else others + queue[2].sum()
    weights = (positives > 0).astype(values.dtype)
    metrics = {"collapsed": losses.uniform_value(positives, others, denominator_mode)}
    if exchange == "gather":
        metrics["contrastive_accuracy"] = losses.contrastive_accuracy(
            outputs, labels, contrast_mode=contrast_mode, axis_name=axis_name, block_size=blocks
        )
    if denominator_mode != "only_negatives":  # which has no floor
        metrics["floor"] = losses.floor(positives, denominator_mode)
        metrics["excess"] = losses.excess(values, positives, denominator_mode)
    weighted = {name: (value, weights) for name, value in metrics.items()}
    if queue is not None:
        weighted["queue_filled"] = (jnp.full_like(weights, queue[2].mean()), jnp.ones_like(weights))
    if use_labels:
        lonely = (same == outputs.shape[1] - 1).astype(values.dtype)
        weighted["lonely"] = (lonely, jnp.ones_like(lonely))
    return values, weights, weighted


def cross_entropy(
    outputs: Float[Array, "b v k"],
    batch: Mapping[str, Array],
    aux: Any,
    *,
    label_smoothing: float = 0.0,
    axis_name: str | None = None,
) -> tuple[PerExample, PerExample, Metrics]:
    """Softmax cross-entropy, the mean over the views.

    Args:
      outputs: logits `[b, v, classes]`; every example stands alone.
      batch: with "label" `[b]`; or, of mixed images, "label" `[b, 2]` and "share" `[b]` of the
        first, whose targets are mixed in the same way.
      aux: not used.
      label_smoothing: share of the target spread evenly over all classes.
      axis_name: not used.

    Returns:
      Losses `[b]`, weights (ones) `[b]`, and the metric `accuracy` (share of the target that the
      largest logit has).
    """
    del aux, axis_name
    labels = batch["label"].reshape(outputs.shape[0], -1)
    share = batch["share"] if "share" in batch else jnp.ones(outputs.shape[0])
    shares = jnp.stack([share, 1 - share], -1)[:, : labels.shape[1], None].astype(outputs.dtype)
    targets = (jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype) * shares).sum(1)
    targets = jnp.broadcast_to(targets[:, None], outputs.shape)
    smooth = optax.smooth_labels(targets, label_smoothing)
    values = optax.softmax_cross_entropy(outputs, smooth).mean(-1)
    weights = jnp.ones_like(values)
    predicted = outputs.argmax(-1)[..., None]
    accuracy = jnp.take_along_axis(targets, predicted, -1).mean((1, 2))
    return values, weights, {"accuracy": (accuracy, weights)}


OBJECTIVES: dict[str, Callable[..., tuple[PerExample, PerExample, Metrics]]] = {
    "contrastive": contrastive,
    "cross_entropy": cross_entropy,
}
INDEPENDENT = ("cross_entropy",)  # means over examples that do not see each other
