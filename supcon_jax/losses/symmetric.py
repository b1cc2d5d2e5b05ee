"""Eq. 2 of a whole batch against itself, in blocks: half of the pairs stand for all of them.

s_ij = s_ji, so that a block above the diagonal serves its rows and its columns. And the sum over
the positives needs no pairs: with c_i the sum of the features of the class of i,

    loss_i = log sum_{j != i} exp(s_ij) - z_i . (c_i - z_i) / (temperature |P(i)|)

Two matrix products of half the pairs and one of all, where the dense form takes three of all.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from supcon_jax.losses.blockwise import Plan, blocks, product
from supcon_jax.losses.pairs import Rows

WIDEST = 60.0  # range of the similarities that exp holds, with room for sums and gradients


def is_bounded(features: Float[Array, "rows dim"], scale: Array) -> Array:
    """Whether all similarities lie so close together that one shift serves them all."""
    return 2 * _bound(features, scale) <= WIDEST


def symmetric_losses(plan: Plan, rows: Rows, scale: Array) -> Float[Array, " rows"]:
    """The loss of each row against all others, for similarities that are bounded (see there)."""
    wide = rows.features.astype(scale.dtype)
    count = len(wide)
    _, classes = jnp.unique(rows.ids.label, size=count, return_inverse=True)
    sums = jax.ops.segment_sum(wide, classes, count)[classes]
    positives = jax.ops.segment_sum(jnp.ones_like(wide[:, 0]), classes, count)[classes] - 1
    to_positives = scale * jnp.sum(wide * (sums - wide), 1)
    log_sums = _log_sum_exp_of_others(plan, rows.features, scale)
    losses = log_sums - to_positives / jnp.maximum(positives, 1)
    return jnp.where(positives > 0, losses, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp_of_others(plan: Plan, z: Array, scale: Array) -> Float[Array, " rows"]:
    return _forward(plan, z, scale)[0]


def _forward(plan: Plan, z: Array, scale: Array) -> tuple[Array, Any]:
    in_blocks, shift = blocks(plan, z), _bound(z, scale)
    used = blocks(plan, jnp.ones_like(z[:, 0], scale.dtype))

    def add(totals: Array, place: Array) -> tuple[Array, None]:
        i, j = place
        exponentials = _exponentials(plan, in_blocks, i, j, scale, shift)
        totals = totals.at[i].add(exponentials @ used[j])
        below = jnp.where(i == j, 0, used[i] @ exponentials)
        return totals.at[j].add(below), None

    totals, _ = jax.lax.scan(add, jnp.zeros_like(used), _upper_half(len(in_blocks)))
    totals = totals.reshape(-1)[: len(z)]
    some = totals > 0  # a single row has no others
    log_sums = jnp.where(some, jnp.log(jnp.where(some, totals, 1)) + shift, 0)
    return log_sums, (z, scale, jnp.where(some, log_sums, jnp.inf), shift)


def _backward(plan: Plan, saved: Any, gradient: Array) -> tuple[Array, Array]:
    z, scale, log_sums, shift = saved
    in_blocks = blocks(plan, z)
    factors = blocks(plan, gradient * jnp.exp(shift - log_sums))

    def add(by_z: Array, place: Array) -> tuple[Array, None]:
        i, j = place
        exponentials = _exponentials(plan, in_blocks, i, j, scale, shift)
        slopes = exponentials * (factors[i][:, None] + factors[j][None])
        slopes = slopes.astype(z.dtype)
        by_z = by_z.at[i].add(product(plan, scale, "ij,jd->id", slopes, in_blocks[j]))
        below = jnp.where(i == j, 0, product(plan, scale, "ij,id->jd", slopes, in_blocks[i]))
        return by_z.at[j].add(below), None

    start = jnp.zeros_like(in_blocks, scale.dtype)
    by_z, _ = jax.lax.scan(add, start, _upper_half(len(in_blocks)))
    by_z = by_z.reshape(-1, z.shape[-1])[: len(z)]
    # z_i . dloss/dz_i counts s_ij once as that of i and once as that of j.
    return by_z.astype(z.dtype), jnp.sum(z * by_z) / (2 * scale)


_log_sum_exp_of_others.defvjp(_forward, _backward)


def _exponentials(
    plan: Plan, z: Array, i: Array, j: Array, scale: Array, shift: Array
) -> Float[Array, "block block"]:
    """exp(s - shift) of block i against block j, 0 for each row against itself."""
    exponentials = jnp.exp(product(plan, scale, "id,jd->ij", z[i], z[j]) - shift)
    itself = jnp.eye(z.shape[1], dtype=bool) & (i == j)
    return jnp.where(itself, 0, exponentials)


def _bound(z: Array, scale: Array) -> Array:
    """The largest similarity that features of these lengths can have."""
    wide = jax.lax.stop_gradient(z).astype(scale.dtype)
    return jax.lax.stop_gradient(scale) * jnp.max(jnp.sum(wide * wide, -1))


def _upper_half(count: int) -> Int[Array, "pairs 2"]:
    """Rows and columns of the blocks on and above the diagonal."""
    return jnp.asarray(np.stack(np.triu_indices(count), 1), jnp.int32)
