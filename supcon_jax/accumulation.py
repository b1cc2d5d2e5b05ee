"""Gradients over micro-batches, for objectives that are a mean over independent examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

# (params, batch_stats, views [b, ...], batch) -> gradient, (loss, outputs [b, ...], batch_stats)
Gradient = Callable[..., tuple[PyTree, tuple[Array, Array, PyTree]]]


def accumulated(gradient: Gradient, micro_batches: int) -> Gradient:
    """The mean gradient over parts of the batch, computed one after the other.

    Equal to the gradient of the whole batch for a mean over examples that do not see each other,
    such as cross-entropy without batch norm; batch norm uses the statistics of each part and moves
    its running ones after each. A contrastive loss compares all examples, so that this would be
    another loss: contrastive stages refuse it.

    Args:
      gradient: `(params, batch_stats, views, batch) -> gradient, (loss, outputs, batch_stats)`.
      micro_batches: number of parts; must divide the batch of a device.

    Returns:
      A function with the same arguments and results.
    """
    if micro_batches == 1:
        return gradient

    def over_parts(
        params: PyTree, batch_stats: PyTree, views: Array, batch: PyTree
    ) -> tuple[PyTree, tuple[Array, Array, PyTree]]:
        def add(carry: tuple[PyTree, PyTree], part: PyTree) -> tuple:
            total, batch_stats = carry
            grads, (loss, outputs, batch_stats) = gradient(params, batch_stats, *part)
            return (jax.tree.map(jnp.add, total, grads), batch_stats), (loss, outputs)

        parts = jax.tree.map(
            lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (views, dict(batch))
        )
        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        summed: tuple[Any, tuple[Array, Array]] = jax.lax.scan(add, start, parts)
        (total, batch_stats), (losses, outputs) = summed
        grads = jax.tree.map(lambda x: x / micro_batches, total)
        return grads, (losses.mean(), outputs.reshape(-1, *outputs.shape[2:]), batch_stats)

    return over_parts
