"""What a recipe will need and send, from its compiled training steps; no image is read.

    python -m supcon_jax.train --config configs/resnet50.py --plan
    python -m supcon_jax.train --config configs/resnet50.py --plan --topology v5e:16x16
    python -m supcon_jax.train --config configs/cifar10.py --plan --memory_gb 16

docs/scaling.md says how to read the table and derives `cost_model`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from supcon_jax import parallel
from supcon_jax.data.datasets import COUNTS
from supcon_jax.data.sources import SOURCES, Source
from supcon_jax.fitting import fit_to_images
from supcon_jax.programs import (
    SENT,
    DoesNotFitError,
    Figures,
    compiled_figures,
    sent_by_kind,
    tpu_devices,
)
from supcon_jax.stages import Data, abstract_state, build_objective, build_stage, check_batch
from supcon_jax.validation import validate

ENOUGH = 0.97  # of the memory: a batch that fills as much is not made larger
MOST_PROGRAMS = 7  # compiled in search of the largest batch


@dataclass(frozen=True)
class StagePlan:
    """The figures of a stage; those of programs are of one device, and of one step."""

    name: str
    devices: int
    batch_size: int
    views: int
    parameters: int
    trained: int
    step: Figures | DoesNotFitError | None  # None: not compiled
    loss: Figures | DoesNotFitError
    model: dict[str, float]  # `cost_model`

    @property
    def peak(self) -> float:
        """Bytes of memory that the step needs, whether it fits or not."""
        assert self.step is not None
        return self.step.peak if isinstance(self.step, Figures) else self.step.needed


def report(config: ConfigDict, topology: str = "", memory_gb: float | None = None) -> str:
    """The table of `--plan`.

    Args:
      config: of a recipe file.
      topology: TPU slice to compile for, such as "v5e:16x16"; "": the devices that are here.
      memory_gb: of a device, in 1e9 bytes; the largest batch that fits is searched for; None: not.

    Returns:
      Lines of at most 80 columns, a column for each stage.

    Raises:
      ValueError: a wrong configuration, topology or memory, or a batch size that the devices cannot
        share.
    """
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise ValueError(
            f"--memory_gb must be positive and finite, the memory of one device in GB, such as 16; "
            f"got {memory_gb}"
        )
    config = config.copy_and_resolve_references()
    fit_to_images(config)
    validate(config)
    mesh = make_mesh(topology)
    plans = [plan_stage(config, name, mesh) for name in config.stages]
    largest = None
    if memory_gb is not None:
        find = partial(largest_batch, config, mesh=mesh, limit=memory_gb * 1e9)
        largest = [find(plan) for plan in plans]
    where = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return table(plans, f"compiled for {where}, jax {jax.__version__}", largest)


def make_mesh(topology: str) -> Mesh:
    """A mesh of the chips of a TPU slice, or, without a name, of the devices that are here."""
    if not topology:
        return parallel.make_mesh()
    jax.config.update("jax_platforms", "cpu")  # nothing is run, and no TPU is taken from others
    return parallel.make_mesh(tpu_devices(topology))


def plan_stage(config: ConfigDict, name: str, mesh: Mesh, step: bool = True) -> StagePlan:
    """Compile the training step of a stage, and its objective alone, and read the programs.

    Args:
      config: of a recipe file.
      name: of the stage.
      mesh: devices to compile for.
      step: False compiles the objective alone.

    Returns:
      The figures.

    Raises:
      ValueError: the batch size is not a multiple of the devices.
    """
    of_stage = config[name]
    source = stand_in(config, of_stage.batch_size)
    data = Data(source, source, source, source)
    check_batch(config, name, data, mesh)
    stage = build_stage(config, name, data, mesh)
    size = config.data.image_size
    shape = (size, size, config.data.channels)
    state = abstract_state(config, name, stage.model, stage.tx, mesh)
    batch = abstract_batch(config, name, source, mesh)
    dim = outputs_of(stage.model, state, shape)
    trained, frozen = _count(state.params), _count(state.frozen)
    contrastive = of_stage.objective.name == "contrastive"
    return StagePlan(
        name=name,
        devices=mesh.size,
        batch_size=of_stage.batch_size,
        views=of_stage.views,
        parameters=trained + frozen,
        trained=trained,
        step=attempt(stage.train_step, state, batch, devices=mesh.size) if step else None,
        loss=loss_alone(of_stage, dim, batch["label"], {**state.aux, "step": state.step}, mesh),
        model=cost_model(
            devices=mesh.size,
            rows=of_stage.batch_size * of_stage.views if contrastive else 0,
            views=of_stage.views,
            dim=dim,
            keys=of_stage.batch_size * (of_stage.views - 1) if of_stage.queue.size else 0,
            trained=trained,
            statistics=_count(
                {k: v for k, v in state.batch_stats.items() if k not in stage.model.frozen}
            ),
            carried=_count(state.batch_stats),
            exchange=of_stage.objective.exchange if contrastive else "gather",
            global_norm=config.model.batch_norm == "global",
        ),
    )


def attempt(jitted: Any, *shapes: Any, devices: int) -> Figures | DoesNotFitError:
    """`compiled_figures`, or what the compiler says that a program needs that does not fit."""
    try:
        return compiled_figures(jitted, *shapes, devices=devices)
    except DoesNotFitError as error:
        return error


def stand_in(config: ConfigDict, batch_size: int) -> Source:
    """The training split as far as a step's shapes depend on it, without any of its images.

    Args:
      config: of a recipe file; its folder of images is looked into where there is one.
      batch_size: the split is made to have this many images at least.

    Returns:
      A source that cannot be loaded from.
    """
    data = config.data
    shape = (data.load_size, data.load_size, data.channels)
    size, classes = COUNTS.get(data.name or data.source, COUNTS["imagenet2012"])
    if data.source == "folder" and data.dir:
        found = SOURCES["folder"](data.train_split, name="", directory=data.dir, shape=shape)
        size, classes = found.size, len(found.class_names)
    streamed = size * math.prod(shape) > data.memory_limit_gb * 1e9
    size = max(size, batch_size)
    labels = np.arange(size, dtype=np.int32) % classes

    def nothing(indices: np.ndarray) -> Any:
        raise NotImplementedError("a plan has no images")

    names = tuple(map(str, range(classes)))
    read = nothing if streamed else None
    return Source("a plan", size, names, shape, nothing, lambda: labels, read)


def abstract_batch(config: ConfigDict, name: str, source: Source, mesh: Mesh) -> dict[str, Any]:
    """Shapes of a global batch of a stage, split over the devices; see `stages.batches`."""
    stage, streamed = config[name], source.read is not None
    count, mixed = stage.batch_size, stage.mix != "none"
    side = config.data.image_size if streamed else config.data.load_size
    stored = 2 if mixed else stage.views if streamed else 1
    batch = {
        "image": jax.ShapeDtypeStruct((count, stored, side, side, config.data.channels), np.uint8),
        "label": jax.ShapeDtypeStruct((count, 2) if mixed else (count,), np.int32),
        "position": jax.ShapeDtypeStruct((count,), np.int32),
    }
    if mixed:
        batch["share"] = jax.ShapeDtypeStruct((count,), np.float32)
    return parallel.placed(batch, mesh, PartitionSpec(parallel.AXIS))


def outputs_of(model: Any, state: Any, image_shape: tuple[int, int, int]) -> int:
    """Size of a model's outputs: of the projection, or the number of classes."""
    variables = {"params": {**state.frozen, **state.params}, "batch_stats": state.batch_stats}
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    # In inference mode, where batch norm does not need the mesh.
    _, outputs = jax.eval_shape(partial(model.apply, train=False), variables, image)
    return outputs.shape[-1]


def loss_alone(
    stage: ConfigDict, dim: int, labels: Any, aux: dict[str, Any], mesh: Mesh
) -> Figures | DoesNotFitError:
    """The objective's value and gradient, from outputs `[b, v, k]` that are there."""
    aux = {name: part for name, part in aux.items() if name in ("queue", "step")}
    objective = build_objective(stage, steps_per_epoch=1)
    shape = (stage.batch_size, stage.views, dim)
    split = PartitionSpec(parallel.AXIS)
    batch = {"label": labels}
    if labels.ndim == 2:
        batch["share"] = jax.ShapeDtypeStruct(labels.shape[:1], np.float32)
    outputs, batch = parallel.placed((jax.ShapeDtypeStruct(shape, np.float32), batch), mesh, split)

    def mean(outputs: Any, batch: Any, aux: Any) -> Any:
        losses, weights, _ = objective(outputs, batch, aux)
        total, count = jax.lax.psum((jnp.sum(losses * weights), jnp.sum(weights)), parallel.AXIS)
        return total / jnp.maximum(count, 1)

    specs = (split, split, PartitionSpec())
    gradient = jax.shard_map(jax.grad(mean), mesh=mesh, in_specs=specs, out_specs=split)
    return attempt(jax.jit(gradient), outputs, batch, aux, devices=mesh.size)


def cost_model(
    *,
    devices: int,
    rows: int,
    views: int,
    dim: int,
    keys: int,
    trained: int,
    statistics: int,
    carried: int,
    exchange: str,
    global_norm: bool,
) -> dict[str, float]:
    """Bytes that a device sends in one step, for ring algorithms, with f = (n - 1) / n.

    An all-reduce of x bytes sends 2 f x, an all-gather or reduce-scatter of x in all f x, a
    permutation what it moves:

        gradients    2 f 4 P, as the parameters are stored, also under model.dtype bfloat16
        batch norm   2 f 4 (2 S + R): moments forward and backward, and the running statistics
        gather       2 f 4 N D + f 4 N / v: features there, their gradients back; labels
        ring         3 4 N D + 2 9 N + f 4 N / v: features twice, their gradients once; ids
        queue        2 f 4 K (D + 1): keys and their labels, of all devices

    A momentum encoder's batch norm adds its forward moments, 2 f 4 S.

    Args:
      devices: n.
      rows: N, views in the global batch; 0 where the objective compares none.
      views: v, of each image.
      dim: D, of the features.
      keys: K, features that a step adds to a queue; 0 where there is none.
      trained: P, parameters with a gradient.
      statistics: S, means and variances of the normalised channels.
      carried: R, running statistics in the state, with those of frozen parts.
      exchange: "gather" or "ring".
      global_norm: the batch norm's moments are those of the global batch.

    Returns:
      "gradients", "batch norm" and "features" (with the queue's), in bytes; all are float32.
    """
    part = (devices - 1) / devices
    passes = 3 if keys else 2  # forward and backward, and the momentum encoder's forward
    moments = passes * statistics if global_norm else 0
    features, labels = 4 * rows * dim, part * 4 * rows / views
    if exchange == "gather" or devices == 1:
        exchanged = 2 * part * features + labels
    else:
        exchanged = 3 * features + 2 * 9 * rows + labels
    return {
        "gradients": 2 * part * 4 * trained,
        "batch norm": 2 * part * 4 * (moments + carried),
        "features": exchanged + 2 * part * 4 * keys * (dim + 1),
    }


def largest_batch(
    config: ConfigDict, plan: StagePlan, *, mesh: Mesh, limit: float
) -> tuple[int, float]:
    """The largest global batch of a stage whose step fits a device's memory, by compiling.

    Args:
      config: of a recipe file.
      plan: of the stage at the recipe's batch size.
      mesh: devices to compile for.
      limit: bytes of a device's memory.

    Returns:
      The batch size in images (0 where not even the smallest fits), and the bytes that it needs.
    """
    stage = config[plan.name]
    multiple = math.lcm(mesh.size * stage.micro_batches, max(1, stage.samples_per_class))

    def needs(batch_size: int) -> float:
        changed = config.copy_and_resolve_references()
        changed[plan.name].batch_size = batch_size
        return plan_stage(changed, plan.name, mesh).peak

    return search(needs, plan.batch_size, plan.peak, limit=limit, multiple=multiple)


def search(
    needs: Callable[[int], float], start: int, needed: float, *, limit: float, multiple: int
) -> tuple[int, float]:
    """The largest multiple whose need is within a limit, in few calls of `needs`.

    A guess is where a line through two known needs reaches the limit, and every other one, where a
    size fits and another fails, is in the middle between them, for needs that jump.

    Args:
      needs: a growing function of the size; expensive.
      start: a size whose need is known.
      needed: its need.
      limit: most that may be needed.
      multiple: the result is a multiple of it.

    Returns:
      The size and its need: `ENOUGH` of the limit, or the best after `MOST_PROGRAMS` calls; (0, 0)
      where nothing fits.
    """
    known = {start: needed}
    for turn in range(MOST_PROGRAMS):
        fits = max((size for size in known if known[size] <= limit), default=0)
        fails = min((size for size in known if known[size] > limit), default=0)
        if fits and known[fits] >= ENOUGH * limit:
            break
        halves = turn % 2 == 1 and fits and fails
        guess = (fits + fails) // 2 if halves else int(_guess(known, limit))
        guess = guess // multiple * multiple
        low, high = fits + multiple, fails - multiple if fails else max(guess, fits + multiple)
        if low > high:
            break
        guess = min(max(guess, low), high)
        known[guess] = needs(guess)
    fits = max((size for size in known if known[size] <= limit), default=0)
    return fits, known.get(fits, 0.0)


def _guess(known: dict[int, float], limit: float) -> float:
    """Where the line through two known points reaches the limit; of one point, by its ratio."""
    nearest = sorted(known, key=lambda size: abs(known[size] - limit))
    below = [size for size in nearest if known[size] <= limit]
    above = [size for size in nearest if known[size] > limit]
    pair = [below[0], above[0]] if below and above else nearest[:2]
    if len(pair) == 1 or known[pair[0]] == known[pair[1]]:
        return pair[0] * min(max(limit / known[pair[0]], 0.25), 4)
    slope = (known[pair[1]] - known[pair[0]]) / (pair[1] - pair[0])
    # A little below the limit: a guess above it would leave nothing that fits.
    return pair[0] + ((1 + ENOUGH) / 2 * limit - known[pair[0]]) / slope


def table(
    plans: list[StagePlan], title: str, largest: list[tuple[int, float]] | None = None
) -> str:
    """The figures of stages, one column each, at most 80 columns wide for three stages."""
    columns = [_cells(plan) for plan in plans]
    for column, found in zip(columns, largest or [], strict=False):
        column["largest batch that fits"] = f"{found[0]:,}" if found[0] else "none"
        column["  its memory"] = _bytes(found[1]) if found[0] else "-"
    names = list(dict.fromkeys(name for column in columns for name in column))
    names = [name for name in names if any(c.get(name, "0 B") != "0 B" for c in columns)]
    rows = [["", *(plan.name for plan in plans)]]
    rows += [[name, *(column.get(name, "-") for column in columns)] for name in names]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(plan: StagePlan) -> dict[str, str]:
    """The column of a stage: `name of the row -> text`."""
    cells = {
        "images x views a step": f"{plan.batch_size:,} x {plan.views}",
        "parameters": f"{plan.parameters:,}",
        "  trained": f"{plan.trained:,}",
    }
    if isinstance(plan.step, Figures):
        step, total = plan.step, plan.step.flops * plan.devices
        cells |= {
            "FLOP an image, all views": _scaled(total / plan.batch_size, ""),
            "FLOP a step, all devices": _scaled(total, ""),
            "memory of a device": _bytes(step.peak),
            "  state and batch": _bytes(step.arguments),
            "  activations and gradients": _bytes(step.temporary),
        }
    elif plan.step is not None:
        cells["memory of a device"] = f"{_bytes(plan.step.needed)}!"
        cells["  too much; there are"] = _bytes(plan.step.available)
    if isinstance(plan.loss, Figures):
        cells["  the loss alone"] = _bytes(plan.loss.temporary)
    if isinstance(plan.step, Figures):
        cells |= _sent(plan.step)
    cells["sent, by the cost model"] = _bytes(sum(plan.model.values()))
    return cells | {f"  {name}": _bytes(sent) for name, sent in plan.model.items()}


def _sent(step: Figures) -> dict[str, str]:
    found = sent_by_kind(step.collectives)
    cells = {"sent by a device, a step": _bytes(sum(sent for _, sent in found.values()))}
    for kind in SENT:
        count, sent = found.get(kind, (0, 0))
        cells[f"  by {kind}"] = f"{_bytes(sent)} in {count:,}" if count else "0 B"
    return cells


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _scaled(count: float, unit: str) -> str:
    """`1.23 GB`: three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 999.5 or prefix == "P":
            break
        count /= 1000
    digits = 0 if not prefix or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {prefix}{unit}".rstrip()


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
