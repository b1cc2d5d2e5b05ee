"""Data parallelism: one mesh axis, over which the batch is split and the state is the same.

The devices may belong to several processes, each with its own part of every batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "data"


def start_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Make this process one of several of a run, before JAX is used for anything else.

    Args:
      coordinator: "HOST:PORT" of process 0; None: found from SLURM, Open MPI, Kubernetes or a TPU
        pod, as are the other two.
      count: processes of the run.
      index: this one's number.

    Raises:
      ValueError: not given and not found, or process 0 does not answer.
    """
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot start the processes of the run: {str(error).splitlines()[0]} Outside of "
            "SLURM, Open MPI, Kubernetes and TPU pods give --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I to each"
        ) from error


def is_writer() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(condition: bool) -> bool:
    """Whether the condition holds in every process."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


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
    """The same arrays on every device of the mesh; every process gives the same ones."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(place, tree)


def placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The shapes of a tree's arrays, laid out over the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def local_places(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The places in a global batch whose rows this process gives to `shard`, ascending."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in slices if index is not None]
    return np.unique(np.concatenate(rows)).astype(np.int32)


def shard(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of each array split over the devices; a process gives those at `local_places`."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def gather(tree: PyTree) -> PyTree:
    """The whole of arrays that are split over the devices, as NumPy's, in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
