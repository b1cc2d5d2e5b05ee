"""What the losses may be given: one clear line for what they may not."""

import operator
import typing
from numbers import Real
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from supcon_jax.losses.pairs import (
    AxisName,
    Exchange,
    Queue,
    Rows,
    Weights,
    axis_size,
    first_sample,
)

BlockSize = int | Literal["auto"] | None

DENSE_BYTES = 256 * 2**20  # up to here block_size="auto" holds all similarities at once
AUTO_BLOCK = 1024


def with_views(features: Array) -> Array:
    """Features as `[batch, views, dim]`, of one view where they have two axes.

    Raises:
      ValueError: another rank, an axis of length 0, or no floats.
    """
    features = jnp.asarray(features)
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise ValueError(
            f"features must be [batch, views, dim] or [batch, dim], got shape {features.shape}"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features must be floating point, got {features.dtype}")
    return features if features.ndim == 3 else features[:, None]


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse what is none of the values of a `Literal`.

    Raises:
      ValueError: it is none of them.
    """
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_exchange(exchange: str, axis_name: AxisName | None) -> None:
    """Refuse unknown exchanges, and a ring of no devices.

    Raises:
      ValueError: neither "gather" nor "ring", or "ring" without an axis.
    """
    check_choice("exchange", exchange, Exchange)
    if exchange == "ring" and axis_name is None:
        raise ValueError("exchange='ring' needs the axis_name of the devices that it goes around")


def not_negative(name: str, value: float) -> float:
    """The number as Python's float, which no array type widens.

    Raises:
      ValueError: no number, or not in [0, inf).
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return float(value)


def check_temperature(temperature: float | Array) -> None:
    """Refuse temperatures that divide by 0 or turn the loss around; a traced one may be any number.

    Raises:
      ValueError: no scalar, or not positive.
    """
    if np.shape(temperature) != ():
        raise ValueError(f"temperature must be one number, got shape {np.shape(temperature)}")
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _integer(value: Any) -> int | None:
    """The value of any integer type; None if it has none, which True has not here."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_targets(labels: Array) -> Array:
    """Multi-hot or soft labels, as floats.

    Raises:
      ValueError: another rank.
    """
    labels = jnp.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must be [batch, classes], got shape {labels.shape}")
    return labels.astype(jnp.promote_types(labels.dtype, jnp.float32))


def check_margin(features: Array, class_weights: Array, margin: int) -> None:
    """Refuse features that do not fit the class weights, and margins without a formula.

    Raises:
      ValueError: wrong shapes, or a margin that is no positive integer.
    """
    if features.ndim != 2 or class_weights.ndim != 2 or features.shape[1] != class_weights.shape[1]:
        raise ValueError(
            "features and class_weights must be [batch, dim] and [classes, dim], got "
            f"{features.shape} and {class_weights.shape}"
        )
    if (_integer(margin) or 0) < 1:
        raise ValueError(f"margin must be a positive integer, got {margin}")


def class_ids(batch: int, labels: Array | None) -> Array:
    """Labels `[batch]` as an array of JAX.

    Raises:
      ValueError: none, another shape, no integers, or integers that JAX would wrap around: two
        classes could become one.
    """
    if labels is None:
        raise ValueError(f"labels must be integers of shape ({batch},), got None")
    given = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if given.shape != (batch,) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape ({batch},), got {given.dtype} {given.shape}"
        )
    _check_range("labels", given)
    return jnp.asarray(given)


def _check_range(name: str, labels: Any) -> None:
    """Refuse integers that JAX would wrap around: two classes could become one."""
    if isinstance(labels, jax.Array):
        return
    given = np.asarray(labels)
    kept = jnp.result_type(given)
    if (given.astype(kept) != given).any():
        raise ValueError(
            f"{name} must fit into {kept}, got {given.min()} to {given.max()}: recode them by "
            "np.unique(labels, return_inverse=True)[1]"
        )


def check_labels(batch: int, labels: Array | None) -> Array | None:
    """`class_ids`, or None where every sample is a class of its own.

    Raises:
      ValueError: as `class_ids`.
    """
    return None if labels is None else class_ids(batch, labels)


def kept_samples(positives_cap: int | None, views: int) -> int | None:
    """How many other samples of its class a cap leaves to an anchor; None: all.

    Raises:
      ValueError: a cap that is no multiple of the views, or below 0.
    """
    if positives_cap is None:
        return None
    cap = _integer(positives_cap)
    if cap is None or cap < 0 or cap % views:
        raise ValueError(
            f"positives_cap must be None or a multiple of the {views} views, got {positives_cap}"
        )
    return cap // views


def check_queue(queue: Queue | None, features: Array, positives_cap: int | None) -> None:
    """Refuse queues whose parts do not fit together or the features, and a cap beside one.

    Raises:
      ValueError: wrong shapes, labels that JAX would wrap around, or a cap.
    """
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
    _check_range("labels of the queue", queue[1])


def mask_weights(
    mask: Array | None,
    labels: Array | None,
    batch: int,
    positives_cap: int | None,
    exchange: str,
    axis_name: AxisName | None,
) -> Weights | None:
    """The mask, `[batch, global batch]`, as a constant, and where the local samples are in it.

    Raises:
      ValueError: another shape, or labels, a cap or the ring beside it.
    """
    if mask is None:
        return None
    for name, given in (("labels", labels), ("positives_cap", positives_cap)):
        if given is not None:
            raise ValueError(f"mask replaces labels and their positives: give no {name} beside it")
    if exchange == "ring":
        raise ValueError("mask needs exchange='gather': the ring knows positives by labels only")
    mask, devices = jnp.asarray(mask), axis_size(axis_name)
    if mask.shape != (batch, batch * devices):
        raise ValueError(
            f"mask must be [batch, global batch] = ({batch}, {batch * devices}), got {mask.shape}"
        )
    return Weights(jax.lax.stop_gradient(mask), first_sample(batch, axis_name))


def choose_block_size(
    block_size: BlockSize, anchors: Rows, contrast: Rows, queue: Rows | None, exchange: str
) -> int | None:
    """Rows of a block, never more than there are; None: all pairs at once.

    Raises:
      ValueError: no positive integer, "auto" or None.
    """
    rows, columns = len(anchors.features), len(contrast.features)
    size = _integer(block_size)
    if block_size == "auto":
        wide = jnp.promote_types(anchors.features.dtype, jnp.float32)
        pairs = rows * (columns + (0 if queue is None else len(queue.features)))
        size = AUTO_BLOCK if wide.itemsize * pairs > DENSE_BYTES else None
    elif block_size is not None and (size is None or size < 1):
        raise ValueError(f"block_size must be a positive number, 'auto' or None, got {block_size}")
    if size is None and exchange == "ring":
        size = columns  # a part of the ring at once
    return size if size is None else min(size, max(rows, columns))
