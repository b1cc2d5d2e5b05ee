"""The contrastive losses in blocks of pairs: exact, in memory linear in the batch.

The loss of an anchor is made of a few sums over the contrast set. `_statistics` adds them up block
by block; the gradient is then a second pass over the same blocks, in which the derivative of the
loss by the similarity s_ij of anchor i and row j has the form

    g_i ( [j in D(i)] h_i exp(s_ij - log D_i) - [j in P(i)] u_ij )

with g_i the incoming gradient, D(i) the set in the denominator, and h and u given by the mode.
Nothing of the size anchors x contrast set is ever held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from supcon_jax.losses.pairs import AxisName, DenominatorMode, Ids, Relation, Rows, Weights, relate


@dataclass(frozen=True)
class Plan:
    """What does not change while the blocks are gone through."""

    inside: bool
    epsilon: float  # in the denominator, taken off the positive that "one_positive" adds
    beta: float  # negatives are weighted by e^(beta s)
    denominator_mode: DenominatorMode
    kept: int | None
    block_size: int | None
    precision: jax.lax.PrecisionLike
    ring: AxisName | None = None  # the mapped axis that the contrast set travels around

    @property
    def log_d_is_shared(self) -> bool:
        """Whether all positives of an anchor have the same denominator."""
        return self.denominator_mode != "one_positive"


class Compared(NamedTuple):
    """What the anchors and the contrast set are, and what has no gradient."""

    anchors: Ids
    contrast: Ids
    weights: Weights | None = None
    queue: Rows | None = None


class LogSum(NamedTuple):
    """A running log sum exp of each anchor: log(total) + shift."""

    shift: Float[Array, " anchors"]
    total: Float[Array, " anchors"]

    def value(self) -> Float[Array, " anchors"]:
        some = self.total > 0
        return jnp.where(some, jnp.log(jnp.where(some, self.total, 1)) + self.shift, -jnp.inf)


class Sums(NamedTuple):
    """Of each anchor, over the rows seen so far."""

    negatives: Float[Array, " anchors"]
    tilt: LogSum  # of beta s over the negatives, where they are weighted
    denominator: LogSum
    weight: Float[Array, " anchors"]  # sum of the positives' weights
    positives: Float[Array, " anchors"]  # Eq. 2: the weighted sum over the positives
    log_positives: LogSum  # Eq. 3: the weighted log sum exp over them
    pull: Float[Array, " anchors"]  # h, where the positives do not share the denominator


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def anchor_losses(
    plan: Plan,
    anchors: Float[Array, "anchors dim"],
    contrast: Float[Array, "contrast dim"],
    scale: Float[Array, ""],
    ids: Compared,
) -> Float[Array, " anchors"]:
    """The loss of each anchor against the contrast set, with s_ij = scale z_i . z_j."""
    return _forward(plan, anchors, contrast, scale, ids)[0]


def _forward(
    plan: Plan, anchors: Array, contrast: Array, scale: Array, ids: Compared
) -> tuple[Array, Any]:
    sums = _statistics(plan, anchors, contrast, scale, ids)
    return _losses(plan, sums), (anchors, contrast, scale, ids, sums)


def _backward(plan: Plan, saved: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    anchors, contrast, scale, ids, sums = saved
    gradient = jnp.where(_counts(plan, sums), gradient, 0)
    by_anchors, by_contrast = _pull_back(plan, anchors, contrast, scale, ids, sums, gradient)
    # s_ij is linear in z_i, so that z_i . dloss/dz_i is the sum of s_ij dloss/ds_ij over j.
    by_scale = jnp.sum(anchors * by_anchors) / scale
    return by_anchors.astype(anchors.dtype), by_contrast.astype(contrast.dtype), by_scale, None


anchor_losses.defvjp(_forward, _backward)


def _losses(plan: Plan, sums: Sums) -> Float[Array, " anchors"]:
    weight = jnp.where(sums.weight > 0, sums.weight, 1)
    if plan.inside:
        losses = jnp.log(weight) - sums.log_positives.value()
    else:
        losses = -sums.positives / weight
    if plan.log_d_is_shared:
        losses += sums.denominator.value()
    return jnp.where(_counts(plan, sums), losses, 0)


def _counts(plan: Plan, sums: Sums) -> Array:
    """Which anchors have a positive, and something in its denominator."""
    return (sums.weight > 0) & ((sums.denominator.total > 0) | (not plan.log_d_is_shared))


def _statistics(plan: Plan, anchors: Array, contrast: Array, scale: Array, ids: Compared) -> Sums:
    """One pass over all pairs; one more each for weighted negatives, which their mean comes before,
    and for positives that do not share their denominator.
    """
    mine = blocks(plan.block_size, (anchors, ids.anchors))
    zeros = jnp.zeros_like(mine[0][..., 0], scale.dtype)
    nothing = LogSum(jnp.full_like(zeros, -jnp.inf), zeros)
    sums = Sums(zeros, nothing, nothing, zeros, zeros, nothing, zeros)

    def sweep(add: Callable[..., Sums], sums: Sums) -> Sums:
        def of_anchors(chunk: Any, block: Any) -> Sums:
            (a, a_ids), start = block

            def with_contrast(sums: Sums, theirs: Any) -> tuple[Sums, None]:
                c, c_ids = theirs
                s = product(plan, scale, "id,jd->ij", a, c)
                return add(
                    plan, sums, s, relate(a_ids, c_ids, plan.kept, ids.weights, scale.dtype)
                ), None

            return jax.lax.scan(with_contrast, start, chunk)[0]

        def over_chunk(sums: Sums, travels: None, chunk: Rows) -> tuple[Sums, None]:
            return jax.lax.map(
                partial(of_anchors, blocks(plan.block_size, chunk)), (mine, sums)
            ), None

        return _around(
            plan, over_chunk, sums, lambda chunk: None, Rows(contrast, ids.contrast), ids.queue
        )[0]

    if plan.beta:
        sums = sweep(_add_tilt, sums)
    sums = sweep(_add, sums)
    if not plan.log_d_is_shared:
        sums = sweep(_add_positives, sums)
    return jax.tree.map(lambda x: x.reshape(-1)[: len(anchors)], sums)


def _add_tilt(plan: Plan, sums: Sums, s: Array, relation: Relation) -> Sums:
    """Take what the weights of the negatives are divided by."""
    return sums._replace(
        negatives=sums.negatives + relation.negative.sum(1),
        tilt=_add_exp(sums.tilt, plan.beta * s, relation.negative),
    )


def _pushed(plan: Plan, sums: Sums, s: Array, relation: Relation) -> Array:
    """What enters the denominator: s plus the logarithm of the negatives' weights."""
    if not plan.beta:
        return s
    log_mean = sums.tilt.value() - jnp.log(jnp.maximum(sums.negatives, 1))
    log_weights = jax.lax.stop_gradient(plan.beta * s - log_mean[:, None])
    return jnp.where(relation.negative, s + log_weights, s)


def _add(plan: Plan, sums: Sums, s: Array, relation: Relation) -> Sums:
    """Take the denominators of a block, and its positives where they share the denominator."""
    pushed = _pushed(plan, sums, s, relation)
    sums = sums._replace(
        denominator=_add_exp(sums.denominator, pushed, _in_denominator(plan, relation)),
        weight=sums.weight + relation.weight.sum(1),
    )
    return _add_positives(plan, sums, s, relation) if plan.log_d_is_shared else sums


def _add_positives(plan: Plan, sums: Sums, s: Array, relation: Relation) -> Sums:
    """Take the positives of a block: x = s, or x = s - log D where they do not share it."""
    x, steepness = _numerators(plan, sums, s)
    if plan.inside:
        x = x + jnp.log(jnp.where(relation.positive, relation.weight, 1))
        added = _add_exp(sums.log_positives, x, relation.positive)
        kept = jnp.where(sums.pull > 0, jnp.exp(sums.log_positives.shift - added.shift), 0)
        shares = _exp(x - added.shift[:, None], relation.positive)
        pull = sums.pull * kept + jnp.sum(shares * steepness, 1)
        return sums._replace(log_positives=added, pull=pull)
    return sums._replace(
        positives=sums.positives + jnp.sum(jnp.where(relation.positive, relation.weight * x, 0), 1),
        pull=sums.pull + jnp.sum(relation.weight * steepness, 1),
    )


def _numerators(plan: Plan, sums: Sums, s: Array) -> tuple[Array, Array]:
    """x of each pair, and its derivative by s."""
    if plan.log_d_is_shared:
        return s, jnp.ones_like(s)
    beside = sums.denominator.value()[:, None] + plan.epsilon - s
    return plan.epsilon - jax.nn.softplus(beside), jax.nn.sigmoid(beside)


def _add_exp(sums: LogSum, x: Array, where: Array) -> LogSum:
    """Add the exponentials of the entries in `where`, shifted by the largest so far."""
    shift = jnp.maximum(sums.shift, jnp.max(x, axis=1, where=where, initial=-jnp.inf))
    safe = jnp.where(jnp.isfinite(shift), shift, 0)
    added = jnp.sum(_exp(x - safe[:, None], where), axis=1)
    return LogSum(shift, sums.total * jnp.exp(sums.shift - safe) + added)


def _exp(x: Array, where: Array) -> Array:
    """exp(x) of the entries in `where`, else 0; the others may overflow, and have no derivative."""
    return jnp.exp(jnp.where(where, x, -jnp.inf))


def _slopes(plan: Plan, sums: Sums, gradient: Array, s: Array, relation: Relation) -> Array:
    """Derivative of sum(gradient x losses) by each similarity of a block."""
    counts = _counts(plan, sums)[:, None]
    positive = relation.positive & counts
    x, steepness = _numerators(plan, sums, s)
    if plan.inside:
        total = sums.log_positives.total
        share = _exp(x - sums.log_positives.value()[:, None], positive) * relation.weight
    else:
        total = sums.weight
        share = relation.weight / jnp.where(total > 0, total, 1)[:, None]
    pushed = _pushed(plan, sums, s, relation)
    log_d = sums.denominator.value()[:, None]
    push = _exp(pushed - log_d, _in_denominator(plan, relation) & counts)
    if not plan.log_d_is_shared:
        push *= (sums.pull / jnp.where(total > 0, total, 1))[:, None]
    return gradient[:, None] * (push - jnp.where(positive, share * steepness, 0))


def _in_denominator(plan: Plan, relation: Relation) -> Array:
    if plan.denominator_mode == "all":
        return relation.positive | relation.negative
    return relation.negative


def _pull_back(
    plan: Plan,
    anchors: Array,
    contrast: Array,
    scale: Array,
    ids: Compared,
    sums: Sums,
    gradient: Array,
) -> tuple[Array, Array]:
    """Gradients by the anchors and by the contrast set, from a second pass over all pairs."""
    mine = blocks(plan.block_size, (anchors, ids.anchors, sums, gradient))
    multiply = partial(product, plan, scale)

    def with_contrast(by_anchors: Array, theirs: Any) -> tuple[Array, Array]:
        c, c_ids = theirs

        def of_anchors(block: Any) -> tuple[Array, Array]:
            a, a_ids, of_block, g = block
            s = multiply("id,jd->ij", a, c)
            slopes = _slopes(
                plan, of_block, g, s, relate(a_ids, c_ids, plan.kept, ids.weights, scale.dtype)
            )
            slopes = as_factor(slopes, a)
            return multiply("ij,jd->id", slopes, c), multiply("ij,id->jd", slopes, a)

        to_anchors, to_contrast = jax.lax.map(of_anchors, mine)
        return by_anchors + to_anchors, to_contrast.sum(0)

    def over_chunk(by_anchors: Array, by_chunk: Array, chunk: Rows) -> tuple[Array, Array]:
        by_anchors, to_chunk = jax.lax.scan(
            with_contrast, by_anchors, blocks(plan.block_size, chunk)
        )
        return by_anchors, by_chunk + to_chunk.reshape(-1, to_chunk.shape[-1])[: len(by_chunk)]

    def zeros(x: Array) -> Array:
        return jnp.zeros_like(x, scale.dtype)

    by_anchors, by_contrast = _around(
        plan,
        over_chunk,
        zeros(mine[0]),
        lambda chunk: zeros(chunk.features),
        Rows(contrast, ids.contrast),
        ids.queue,
    )
    return by_anchors.reshape(-1, anchors.shape[-1])[: len(anchors)], by_contrast


def _around(
    plan: Plan,
    over_chunk: Callable[[Any, Any, Rows], tuple[Any, Any]],
    stays: Any,
    start: Callable[[Rows], Any],
    contrast: Rows,
    queue: Rows | None,
) -> tuple[Any, Any]:
    """Take the queue, then the contrast set: at once, or device by device around the ring.

    Args:
      plan: with the ring's axis.
      over_chunk: `(stays, travels, rows) -> (stays, travels)`.
      stays: what stays on this device.
      start: `rows -> travels`, what goes around together with the rows and comes home.
      contrast: the whole contrast set, or this device's part where there is a ring.
      queue: extra rows, the same on all devices.
    """
    if queue is not None:
        stays, _ = over_chunk(stays, start(queue), queue)
    if plan.ring is None:
        return over_chunk(stays, start(contrast), contrast)
    devices = jax.lax.axis_size(plan.ring)
    to_the_next = [(device, (device + 1) % devices) for device in range(devices)]

    def take_and_pass_on(_: Any, carry: Any) -> Any:
        stays, travels, chunk = carry
        stays, travels = over_chunk(stays, travels, chunk)
        return stays, *jax.lax.ppermute((travels, chunk), plan.ring, to_the_next)

    stays, travels, _ = jax.lax.fori_loop(
        0, devices, take_and_pass_on, (stays, start(contrast), contrast)
    )
    return stays, travels


def product(plan: Plan, scale: Array, spec: str, x: Array, y: Array) -> Array:
    products = jnp.einsum(spec, x, y, precision=plan.precision, preferred_element_type=scale.dtype)
    return scale * products


def as_factor(slopes: Array, features: Array) -> Array:
    """Slopes as the other factor of a product with features: those of float16 stay float32, for
    slopes fall with the square of the batch and float16 ends at 6e-8.
    """
    return slopes if features.dtype == jnp.float16 else slopes.astype(features.dtype)


def blocks(size: int | None, tree: Any) -> Any:
    """`[rows, ...]` -> `[blocks, size, ...]`, filled up by zeros: rows that are not valid."""
    assert size is not None  # the dense form has no blocks

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, tree)
