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

from supcon_jax.losses.blockwise import Compared, Plan, anchor_losses, as_factor, blocks, product
from supcon_jax.losses.pairs import Rows, of_class

WIDEST = 60.0  # range of the similarities that exp holds, with room for sums and gradients


def losses_in_blocks(
    plan: Plan, anchors: Rows, contrast: Rows, scale: Array, compared: Compared, whole: bool
) -> Float[Array, " anchors"]:
    """The loss of each anchor: from half of the pairs where they are enough, else from all.

    `whole`: the anchors are the contrast set.
    """
    of_all_pairs = partial(
        anchor_losses, plan, anchors.features, contrast.features, scale, compared
    )
    if not (whole and _is_plain(plan, compared)):
        return of_all_pairs()
    return jax.lax.cond(
        _is_bounded(anchors.features, scale),
        lambda: _symmetric_losses(plan, anchors, scale),
        of_all_pairs,
    )


def _is_plain(plan: Plan, compared: Compared) -> bool:
    """Whether the loss is Eq. 2 of the batch and nothing else."""
    paper = plan.denominator_mode == "all" and not plan.inside and not plan.beta
    return paper and plan.kept is None and compared.weights is None and compared.queue is None


def _is_bounded(features: Float[Array, "rows dim"], scale: Array) -> Array:
    """Whether all similarities lie so close together that one shift serves them all."""
    return 2 * _bound(features, scale) <= WIDEST


def _symmetric_losses(plan: Plan, rows: Rows, scale: Array) -> Float[Array, " rows"]:
    """The loss of each row against all others, for similarities that are bounded (see there)."""
    wide = rows.features.astype(scale.dtype)
    positives = of_class(rows.ids.label, jnp.ones_like(wide[:, 0])) - 1
    to_positives = scale * jnp.sum(wide * (of_class(rows.ids.label, wide) - wide), 1)
    log_sums = _log_sum_exp_of_others(plan, rows.features, scale)
    losses = log_sums - to_positives / jnp.maximum(positives, 1)
    return jnp.where(positives > 0, losses, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp_of_others(plan: Plan, z: Array, scale: Array) -> Float[Array, " rows"]:
    return _forward(plan, z, scale)[0]


def _forward(plan: Plan, z: Array, scale: Array) -> tuple[Array, Any]:
    in_blocks, shift = blocks(plan.block_size, z), _bound(z, scale)
    exponentials = partial(_exponentials, plan, scale, shift)
    used = blocks(plan.block_size, jnp.ones_like(z[:, 0], scale.dtype))

    def on_diagonal(block: tuple[Array, Array]) -> Array:
        mine, is_used = block
        return _without_itself(exponentials(mine, mine)) @ is_used

    def add_above(totals: Array, place: Array) -> tuple[Array, None]:
        i, j = place
        pairs = exponentials(in_blocks[i], in_blocks[j])
        totals = totals.at[i].add(pairs @ used[j])
        return totals.at[j].add(used[i] @ pairs), None

    totals = jax.lax.map(on_diagonal, (in_blocks, used))
    totals, _ = jax.lax.scan(add_above, totals, _above_diagonal(len(in_blocks)))
    totals = totals.reshape(-1)[: len(z)]
    some = totals > 0  # a single row has no others
    log_sums = jnp.where(some, jnp.log(jnp.where(some, totals, 1)) + shift, 0)
    return log_sums, (z, scale, jnp.where(some, log_sums, jnp.inf), shift)


def _backward(plan: Plan, saved: Any, gradient: Array) -> tuple[Array, Array]:
    z, scale, log_sums, shift = saved
    in_blocks = blocks(plan.block_size, z)
    transposed = in_blocks.mT  # a product with the transpose of a block of pairs is slower
    factors = blocks(plan.block_size, gradient * jnp.exp(shift - log_sums))
    multiply = partial(product, plan, scale)

    def slopes_of(pairs: Array, mine: Array, theirs: Array) -> Array:
        return as_factor(pairs * (mine[:, None] + theirs[None]), z)

    def on_diagonal(block: tuple[Array, Array]) -> Array:
        mine, factor = block
        pairs = _without_itself(_exponentials(plan, scale, shift, mine, mine))
        return multiply("di,ij->dj", mine.T, slopes_of(pairs, factor, factor))

    def add_above(by_z: Array, place: Array) -> tuple[Array, None]:
        i, j = place
        pairs = _exponentials(plan, scale, shift, in_blocks[i], in_blocks[j])
        slopes = slopes_of(pairs, factors[i], factors[j])
        by_z = by_z.at[i].add(multiply("dj,ij->di", transposed[j], slopes))
        return by_z.at[j].add(multiply("di,ij->dj", transposed[i], slopes)), None

    by_z = jax.lax.map(on_diagonal, (in_blocks, factors))
    by_z, _ = jax.lax.scan(add_above, by_z, _above_diagonal(len(in_blocks)))
    by_z = by_z.mT.reshape(-1, z.shape[-1])[: len(z)]
    # z_i . dloss/dz_i counts s_ij once as that of i and once as that of j.
    return by_z.astype(z.dtype), jnp.sum(z * by_z) / (2 * scale)


_log_sum_exp_of_others.defvjp(_forward, _backward)


def _exponentials(
    plan: Plan, scale: Array, shift: Array, mine: Array, theirs: Array
) -> Float[Array, "block block"]:
    return jnp.exp(product(plan, scale, "id,jd->ij", mine, theirs) - shift)


def _without_itself(pairs: Float[Array, "block block"]) -> Float[Array, "block block"]:
    return jnp.where(jnp.eye(len(pairs), dtype=bool), 0, pairs)


def _bound(z: Array, scale: Array) -> Array:
    """The largest similarity that features of these lengths can have."""
    wide = jax.lax.stop_gradient(z).astype(scale.dtype)
    return jax.lax.stop_gradient(scale) * jnp.max(jnp.sum(wide * wide, -1))


def _above_diagonal(count: int) -> Int[Array, "pairs 2"]:
    """Rows and columns of the blocks."""
    return jnp.asarray(np.stack(np.triu_indices(count, 1), 1), jnp.int32)
