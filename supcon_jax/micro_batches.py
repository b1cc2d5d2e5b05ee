"""The gradient of a batch whose activations do not fit: micro-batches, one after the other.

For any objective, a *gradient cache* (Gao et al., 2021): with the loss L of the outputs
z = (z_1, ..., z_m) of all micro-batches,

    dL/dtheta = sum_j (dz_j/dtheta)^T dL/dz_j

so that the outputs are computed first, keeping nothing else; then L and the gradients dL/dz_j; then
each z_j once more, to take its gradient to the parameters. This is exact, and costs one more
forward pass. Where L is a mean over examples that do not see each other, each part has its own
gradient at once, and these are averaged: *gradient accumulation*, without the additional pass.

Batch norm normalises each micro-batch (on all devices, where it is global) by its own statistics,
and moves the running ones once after each, in order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Batch = Mapping[str, Array]
Outputs = Float[Array, "b v k"]
# (params, batch_stats, batch) -> outputs, batch_stats
Encode = Callable[[PyTree, PyTree, Batch], tuple[Outputs, PyTree]]
# (outputs, batch) -> the value that is differentiated, those that are reported
Loss = Callable[[Outputs, Batch], tuple[Array, PyTree]]
# (params, batch_stats, batch) -> gradient, (reported, outputs, batch_stats)
Gradient = Callable[[PyTree, PyTree, Batch], tuple[PyTree, tuple[PyTree, Outputs, PyTree]]]


def gradient_of(
    encode: Encode,
    loss: Loss,
    axis_name: str | None = None,
    *,
    micro_batches: int = 1,
    independent: bool = False,
    unroll: bool = False,
) -> Gradient:
    """The gradient of the loss of the encoded batch, with the activations of a micro-batch.

    Args:
      encode: `(params, batch_stats, batch) -> outputs [b, v, k], batch_stats`.
      loss: `(outputs, batch) -> scaled, reported`; the sums over devices are inside.
      axis_name: mapped axis that the batch is split over, or None.
      micro_batches: number of parts, 1 for the whole batch at once; must divide the batch of a
        device.
      independent: the loss is a mean over examples that do not see each other.
      unroll: the program has the parts one after the other instead of a loop: for a CPU, where XLA
        computes convolutions in loops many times more slowly. It also sees there that a part is
        encoded twice, and keeps its activations instead.

    Returns:
      `(params, batch_stats, batch) -> gradient of scaled, (reported, outputs, batch_stats)`.
      Gradient and reported values are over all devices; the statistics may differ between devices.

    Raises:
      ValueError: when called, if the parts do not divide the batch.

    References:
      Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
      https://arxiv.org/abs/2101.06983, section 3.2.
    """
    if micro_batches == 1:
        return _direct(_with_own_params(encode, axis_name), loss)
    if independent:
        return _accumulated(_direct(encode, loss), micro_batches, axis_name, unroll)
    return _direct(_cached(encode, micro_batches, axis_name, unroll), loss)


def _direct(encode: Encode, loss: Loss) -> Gradient:
    def composed(
        params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[Array, tuple[PyTree, Outputs, PyTree]]:
        outputs, batch_stats = encode(params, batch_stats, batch)
        scaled, reported = loss(outputs, batch)
        return scaled, (reported, outputs, batch_stats)

    return jax.grad(composed, has_aux=True)


def _with_own_params(encode: Encode, axis_name: str | None) -> Encode:
    """`encode` whose gradients are summed over devices as the parameters are stored, in float32;
    else it would be done where they are used, in the encoder's type.
    """
    return lambda params, *rest: encode(_of_device(params, axis_name), *rest)


def _cached(encode: Encode, micro_batches: int, axis_name: str | None, unroll: bool) -> Encode:
    """`encode`, part by part; going backward, each part is encoded again."""

    def over_parts(params: PyTree, batch_stats: PyTree, batch: Batch) -> tuple[Outputs, PyTree]:
        params, batch_stats = _of_device((params, batch_stats), axis_name)

        def one(batch_stats: PyTree, part: Batch) -> tuple[PyTree, Outputs]:
            outputs, batch_stats = encode(params, batch_stats, part)
            return jax.lax.stop_gradient(batch_stats), outputs

        again = jax.checkpoint(one, prevent_cse=unroll)  # in a loop there is none
        batch_stats, outputs = jax.lax.scan(
            again, batch_stats, _parts(batch, micro_batches), unroll=unroll
        )
        return _joined(outputs), batch_stats

    return over_parts


def _accumulated(
    gradient: Gradient, micro_batches: int, axis_name: str | None, unroll: bool
) -> Gradient:
    """The mean of the gradients of all parts, summed over the devices once."""

    def over_parts(
        params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[PyTree, tuple[PyTree, Outputs, PyTree]]:
        params, batch_stats = _of_device((params, batch_stats), axis_name)

        def add(carry: tuple[PyTree, PyTree], part: Batch) -> tuple:
            total, batch_stats = carry
            grads, (reported, outputs, batch_stats) = gradient(params, batch_stats, part)
            return (jax.tree.map(jnp.add, total, grads), batch_stats), (reported, outputs)

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        summed: tuple[Any, tuple[PyTree, Array]] = jax.lax.scan(
            add, start, _parts(batch, micro_batches), unroll=unroll
        )
        (total, batch_stats), (reported, outputs) = summed
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        grads = jax.tree.map(lambda x: x / micro_batches, total)
        reported = jax.tree.map(lambda x: x.mean(0), reported)
        return grads, (reported, _joined(outputs), batch_stats)

    return over_parts


def _of_device(tree: PyTree, axis_name: str | None) -> PyTree:
    """The same values as each device's own: their gradients are summed over devices once, here,
    and not once a part.
    """
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")


def _parts(batch: Batch, count: int) -> Batch:
    """`[b, ...]` -> `[count, b / count, ...]`."""
    examples = len(jax.tree.leaves(batch)[0])
    if examples % count:
        raise ValueError(
            f"micro_batches must divide the {examples} examples of a device; got {count}"
        )
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), dict(batch))


def _joined(outputs: Array) -> Outputs:
    """`[count, n, v, k]` -> `[count * n, v, k]`."""
    return outputs.reshape(-1, *outputs.shape[2:])
