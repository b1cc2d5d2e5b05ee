"""A momentum encoder with a labelled queue: more to contrast with than the batch holds.

View 0 of every image passes through the encoder that is trained and is the anchor (a *query*); the
other views pass through a copy that follows it, without gradient (*keys*):

    theta_k <- m theta_k + (1 - m) theta    after every step

The keys of the last batches wait in a queue with their labels, first in, first out. An anchor is
compared with all other queries and all keys of the global batch and with the queue's rows; those of
its class are positives, wherever they are.

A row is used from the step after its own for size / (keys of a batch) steps, the largest age that a
feature has when it is used; m near 1 keeps the encoder from moving far in that time.

References:
  He et al., 2019, https://arxiv.org/abs/1911.05722 (momentum encoder and queue); Khosla et al.,
  2020, https://arxiv.org/abs/2004.11362, section 4.1 (their use for SupCon, whose code was never
  released).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

Rows = tuple[Float[Array, "queue dim"], Int[Array, " queue"], Bool[Array, " queue"]]


def start(params: PyTree, size: int, dim: int) -> dict[str, PyTree]:
    """The momentum encoder, equal to `params`, and an empty queue, for the state's `aux`.

    Args:
      params: the trainable parameters.
      size: rows of the queue.
      dim: of a feature.

    Returns:
      "momentum", a tree as `params`; "queue", with "features" `[size, dim]`, "labels" `[size]`,
      "next", the row that is written next, and "filled", how many are valid.
    """
    queue = {
        "features": jnp.zeros((size, dim)),
        "labels": jnp.zeros(size, jnp.int32),
        "next": jnp.zeros((), jnp.int32),
        "filled": jnp.zeros((), jnp.int32),
    }
    return {"momentum": jax.tree.map(jnp.copy, params), "queue": queue}


def rows(queue: dict[str, Array]) -> Rows:
    """Features, labels and validity, as the losses' `queue` argument."""
    features = queue["features"]
    return features, queue["labels"], jnp.arange(len(features)) < queue["filled"]


def follow(
    aux: dict[str, Any],
    params: PyTree,
    keys: Float[Array, "b v dim"],
    labels: Int[Array, " b"],
    step: Int[Array, ""],
    *,
    decay: float,
    keep_from: int = 0,
    axis_name: str | None = None,
) -> dict[str, Any]:
    """`aux` after a step: the encoder a little nearer to `params`, the keys in the queue.

    Args:
      aux: with "momentum" and "queue", see `start`.
      params: after the step.
      keys: `[b, v, dim]`, of this device.
      labels: `[b]`.
      step: steps done before this one.
      decay: m, from 0 (the trained encoder itself) to below 1.
      keep_from: keys of earlier steps are not kept: the encoder moves fast at first.
      axis_name: mapped axis that the batch is split over; all devices keep the keys of all.

    Returns:
      The new `aux`.
    """
    queue, size = aux["queue"], len(aux["queue"]["labels"])
    _, views, dim = keys.shape
    features = _of_all_devices(keys.reshape(-1, dim).astype(queue["features"].dtype), axis_name)
    classes = _of_all_devices(jnp.repeat(labels, views).astype(jnp.int32), axis_name)
    places = (queue["next"] + jnp.arange(len(classes))) % size
    count = jnp.where(step >= keep_from, len(classes), 0)
    queue = {
        "features": queue["features"].at[places].set(features),
        "labels": queue["labels"].at[places].set(classes),
        "next": (queue["next"] + count) % size,
        "filled": jnp.minimum(queue["filled"] + count, size),
    }
    momentum = optax.incremental_update(params, aux["momentum"], 1.0 - decay)
    return {**aux, "momentum": momentum, "queue": queue}


def _of_all_devices(x: Array, axis_name: str | None) -> Array:
    """All rows in the order of the devices; unlike after `all_gather`, `shard_map` knows that they
    are the same on every device, which the state must be.
    """
    if axis_name is None:
        return x
    whole = jnp.zeros((len(x) * jax.lax.axis_size(axis_name), *x.shape[1:]), x.dtype)
    mine = jax.lax.axis_index(axis_name) * len(x)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, x, mine, 0), axis_name)
