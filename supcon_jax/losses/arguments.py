"""What the losses may be given: one clear line for what they may not."""

import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from supcon_jax.losses.pairs import Exchange, Queue, Rows, Weights, axis_size, first_sample

BlockSize = int | Literal["auto"] | None

DENSE_BYTES = 256 * 2**20  # up to here block_size="auto" holds all similarities at once
AUTO_BLOCK = 1024


def with_views(features: Array) -> Array:
    features = jnp.asarray(features)
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise ValueError(
            f"features must be [batch, views, dim] or [batch, dim], got shape {features.shape}"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features must be floating point, got {features.dtype}")
    return features if features.ndim == 3 else features[:, None]


def check_choice(name: str, value: str, choices: object) -> None:
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_exchange(exchange: str, axis_name: str | None) -> None:
    check_choice("exchange", exchange, Exchange)
    if exchange == "ring" and axis_name is None:
        raise ValueError("exchange='ring' needs the axis_name of the devices that it goes around")


def check_not_negative(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < float("inf")):
        raise ValueError(f"{name} must be a number >= 0, got {value}")


def check_temperature(temperature: float | Array) -> None:
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_targets(labels: Array) -> Array:
    """Multi-hot or soft labels, as floats."""
    labels = jnp.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must be [batch, classes], got shape {labels.shape}")
    return labels.astype(jnp.promote_types(labels.dtype, jnp.float32))


def check_margin(features: Array, class_weights: Array, margin: int) -> None:
    if features.ndim != 2 or class_weights.ndim != 2 or features.shape[1] != class_weights.shape[1]:
        raise ValueError(
            "features and class_weights must be [batch, dim] and [classes, dim], got "
            f"{features.shape} and {class_weights.shape}"
        )
    if not isinstance(margin, int) or margin < 1:
        raise ValueError(f"margin must be a positive integer, got {margin}")


def check_labels(batch: int, labels: Array | None) -> None:
    if labels is not None and (
        labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise ValueError(
            f"labels must be integers of shape ({batch},), got {labels.dtype} {labels.shape}"
        )


def check_cap(positives_cap: int | None, views: int) -> None:
    if positives_cap is not None and (positives_cap < 0 or positives_cap % views):
        raise ValueError(
            f"positives_cap must be None or a multiple of the {views} views, got {positives_cap}"
        )


def check_queue(queue: Queue | None, features: Array, positives_cap: int | None) -> None:
    if queue is None:
        return
    if positives_cap is not None:
        raise ValueError("positives_cap chooses among the samples of the batch: give no queue")
    rows, labels, valid = (jnp.shape(part) for part in queue)
    if len(rows) != 2 or rows[1] != features.shape[-1] or not labels == valid == rows[:1]:
        raise ValueError(
            f"queue must be features [queue, {features.shape[-1]}], labels [queue] and valid "
            f"[queue], got {rows}, {labels} and {valid}"
        )


def mask_weights(
    mask: Array | None,
    labels: Array | None,
    batch: int,
    positives_cap: int | None,
    exchange: str,
    axis_name: str | None,
) -> Weights | None:
    if mask is None:
        return None
    for name, given in (("labels", labels), ("positives_cap", positives_cap)):
        if given is not None:
            raise ValueError(f"mask replaces labels and their positives: give no {name} beside it")
    if exchange == "ring":
        raise ValueError("mask needs exchange='gather': the ring knows positives by labels only")
    devices = axis_size(axis_name)
    if mask.shape != (batch, batch * devices):
        raise ValueError(
            f"mask must be [batch, global batch] = ({batch}, {batch * devices}), got {mask.shape}"
        )
    return Weights(jax.lax.stop_gradient(jnp.asarray(mask)), first_sample(batch, axis_name))


def choose_block_size(
    block_size: BlockSize, anchors: Rows, contrast: Rows, exchange: str
) -> int | None:
    rows, columns = len(anchors.features), len(contrast.features)
    if block_size == "auto":
        block_size = AUTO_BLOCK if 4 * rows * columns > DENSE_BYTES else None
    elif block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"block_size must be a positive number, 'auto' or None, got {block_size}")
    if block_size is None and exchange == "ring":
        block_size = columns  # a part of the ring at once
    return block_size if block_size is None else min(block_size, max(rows, columns))
