"""Data parallelism: one mesh axis, over which the batch is split and the state is the same."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of the given ones) along the one axis "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def data_parallel(step: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """`jit(shard_map(step))`: the state on all devices and donated, the batch split."""
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(everywhere, split), out_specs=(everywhere, everywhere)
    )
    return jax.jit(mapped, donate_argnums=0)


def data_parallel_eval(step: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """`jit(shard_map(eval_step))`: results split like the batch, nothing donated."""
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=split))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of each array split over the devices of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
