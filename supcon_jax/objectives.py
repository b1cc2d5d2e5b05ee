"""Objectives: what a stage minimises, as functions of the outputs and the batch.

Every objective is `(outputs [b, v, k], batch, aux) -> (losses [b], weights [b], metrics)`; aux is
the state's, and "step". The step averages the losses over all devices by their weights, and each
metric by its own weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from supcon_jax import losses, momentum
from supcon_jax.losses.pairs import ContrastMode, DenominatorMode, Exchange
from supcon_jax.metrics import Metrics, PerExample, contrastive_metrics

Objective = Callable[[Array, Mapping[str, Array], Any], tuple[PerExample, PerExample, Metrics]]


def contrastive(
    outputs: Float[Array, "b v k"],
    batch: Mapping[str, Array],
    aux: Any,
    *,
    loss: str = "supcon",
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
      aux: its "queue", where there is one, is contrasted with too, see `momentum`.
      loss: name in `LOSSES`; of "triplet", `temperature` is half the margin.
      use_labels: False drops the labels (SimCLR).
      temperature: see `losses.supcon_loss`.
      contrast_mode: see there.
      denominator_mode: see there.
      positives_cap: see there; -1: all.
      exchange: see there.
      block_size: see there; 0: "auto".
      axis_name: mapped axis that the batch is split over.

    Returns:
      Losses `[b]`; weights `[b]`, 0 where a loss has no value; and `contrastive_metrics`.
    """
    labels = batch["label"] if use_labels else None
    options: dict[str, Any] = dict(
        temperature=temperature,
        contrast_mode=contrast_mode,
        denominator_mode=denominator_mode,
        positives_cap=None if positives_cap < 0 else positives_cap,
        queue=momentum.rows(aux["queue"]) if "queue" in aux else None,
        exchange=exchange,
        block_size=block_size or "auto",
        axis_name=axis_name,
    )
    values = LOSSES[loss](outputs, labels, **options)
    weights, metrics = contrastive_metrics(values, outputs, labels, loss=loss, **options)
    return values, weights, metrics


def _triplet_loss(
    outputs: Array, labels: Array, *, temperature: float, axis_name: str | None, **_: Any
) -> Array:
    return losses.triplet_loss(outputs, labels, temperature=temperature, axis_name=axis_name)


LOSSES: dict[str, Callable[..., PerExample]] = {
    "supcon": losses.supcon_loss,
    "supcon_in": losses.supcon_in_loss,
    "triplet": _triplet_loss,
}


def cross_entropy(
    outputs: Float[Array, "b v k"],
    batch: Mapping[str, Array],
    aux: Any,
    *,
    label_smoothing: float = 0.0,
    margin: int = 1,
    margin_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[PerExample, PerExample, Metrics]:
    """Softmax cross-entropy, the mean over the views.

    Args:
      outputs: logits `[b, v, classes]`; every example stands alone.
      batch: with "label" `[b]`; or, of mixed images, "label" `[b, 2]` and "share" `[b]` of the
        first, whose targets are mixed in the same way.
      aux: its "step", from 0 on, is used where there is a margin.
      label_smoothing: share of the target spread evenly over all classes.
      margin: of large-margin softmax, for which the outputs are those of a `MarginClassifier`.
      margin_steps: until the margin is whole, growing linearly.
      axis_name: not used.

    Returns:
      Losses `[b]`, weights (ones) `[b]`, and the metric `accuracy` (share of the target that the
      largest logit has, without the margin: as it is evaluated).
    """
    del axis_name
    logits, squared = jnp.split(outputs, 2, axis=-1) if margin > 1 else (outputs, None)
    if squared is not None:
        own = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
        share = jnp.minimum((aux["step"] + 1) / margin_steps, 1)
        outputs = losses.with_margin(logits, squared, own, margin, share)
    labels = batch["label"].reshape(outputs.shape[0], -1)
    share = batch["share"] if "share" in batch else jnp.ones(outputs.shape[0])
    shares = jnp.stack([share, 1 - share], -1)[:, : labels.shape[1], None].astype(outputs.dtype)
    targets = (jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype) * shares).sum(1)
    targets = jnp.broadcast_to(targets[:, None], outputs.shape)
    smooth = optax.smooth_labels(targets, label_smoothing)
    values = optax.softmax_cross_entropy(outputs, smooth).mean(-1)
    weights = jnp.ones_like(values)
    accuracy = jnp.take_along_axis(targets, logits.argmax(-1)[..., None], -1).mean((1, 2))
    return values, weights, {"accuracy": (accuracy, weights)}


OBJECTIVES: dict[str, Callable[..., tuple[PerExample, PerExample, Metrics]]] = {
    "contrastive": contrastive,
    "cross_entropy": cross_entropy,
}
INDEPENDENT = ("cross_entropy",)  # means over examples that do not see each other
