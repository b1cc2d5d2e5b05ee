"""Who is compared with whom: anchors, contrast set, and the positives and negatives among them."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

ContrastMode = Literal["all", "one"]
DenominatorMode = Literal["all", "one_positive", "only_negatives"]
Exchange = Literal["gather", "ring"]
AxisName = str | tuple[str, ...]  # several axes are one, of all their devices in that order
Features = Float[Array, "batch views dim"] | Float[Array, "batch dim"]
Labels = Int[Array, " batch"]
Mask = Num[Array, "batch global_batch"] | Bool[Array, "batch global_batch"]
Queue = tuple[Float[Array, "queue dim"], Int[Array, " queue"], Bool[Array, " queue"]]


class Ids(NamedTuple):
    """What decides who is positive and negative to whom, one value a row."""

    entry: Int[Array, " rows"]  # its place in the global batch; that of a queue's row is -1
    sample: Int[Array, " rows"]  # that of its sample
    label: Int[Array, " rows"]
    rank: Int[Array, " rows"]  # how many samples of its class come before its own
    valid: Bool[Array, " rows"]


class Weights(NamedTuple):
    """A mask for the local samples."""

    of_samples: Float[Array, "batch global_batch"]
    first: Int[Array, ""] | int  # place of the first local sample in the global batch


class Relation(NamedTuple):
    """Of anchors (rows) and contrast (columns)."""

    weight: Float[Array, "anchors contrast"]  # of P(i); 0 for all others
    negative: Bool[Array, "anchors contrast"]  # N(i)

    @property
    def positive(self) -> Bool[Array, "anchors contrast"]:
        return self.weight > 0


def relate(
    anchors: Ids, contrast: Ids, kept: int | None, weights: Weights | None, dtype: Any
) -> Relation:
    """Positives with their weights, and negatives.

    Args:
      anchors: `[anchors]`.
      contrast: `[contrast]`.
      kept: other samples that stay positives of each sample, those of the lowest rank; None: all.
      weights: the mask that stands in for the labels, or None.
      dtype: of the weights.
    """
    mine = jax.tree.map(lambda x: x[:, None], anchors)
    theirs = jax.tree.map(lambda x: x[None], contrast)
    itself = mine.entry == theirs.entry
    if weights is not None:
        weight = weights.of_samples[mine.sample - weights.first, theirs.sample]
        weight = jnp.where(itself | (theirs.sample < 0) | ~theirs.valid, 0, weight)
        return Relation(weight.astype(dtype), (weight == 0) & ~itself & theirs.valid)
    same = mine.label == theirs.label
    positive = same & ~itself & theirs.valid
    if kept is not None:
        before = theirs.rank - (mine.rank < theirs.rank)
        positive &= (mine.sample == theirs.sample) | (before < kept)
    return Relation(positive.astype(dtype), ~same & theirs.valid)


def products(
    anchors: Float[Array, "anchors dim"],
    contrast: Float[Array, "contrast dim"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "anchors contrast"]:
    """z_i . z_a of all pairs, at least float32."""
    wide = jnp.promote_types(anchors.dtype, jnp.float32)
    return jnp.einsum(
        "id,ad->ia", anchors, contrast, precision=precision, preferred_element_type=wide
    )


def precision_of(precision: jax.lax.PrecisionLike, features: Array) -> jax.lax.PrecisionLike:
    """The precision that is asked for, or HIGHEST for float32 and float64, or JAX's default."""
    if precision is None and features.dtype in (jnp.float32, jnp.float64):
        return jax.lax.Precision.HIGHEST  # the default is TF32 on GPU, bfloat16 on TPU
    return precision


class Rows(NamedTuple):
    """Features, one row a view, and what they are."""

    features: Float[Array, "rows dim"]
    ids: Ids


def arrange(
    features: Float[Array, "batch views dim"],
    labels: Labels | None,
    *,
    contrast_mode: ContrastMode,
    positives_cap: int | None,
    axis_name: AxisName | None,
    exchange: Exchange,
) -> tuple[Rows, Rows]:
    """The anchors of this device, and the contrast set: of all devices, or its part of a ring.

    Raises:
      ValueError: features or labels that are the same on all devices of `axis_name`.
    """
    batch, views, dim = features.shape
    for x in (features,) if labels is None else (features, labels):
        _check_varies(x, axis_name)
    global_labels = None if labels is None else gather(labels, axis_name)
    everything = _batch_ids(batch * axis_size(axis_name), views, global_labels, positives_cap)
    start = first_sample(batch, axis_name) * views
    mine = Rows(
        features.reshape(-1, dim),
        jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch * views), everything),
    )
    anchors = mine if contrast_mode == "all" else jax.tree.map(lambda x: x[::views], mine)
    if exchange == "ring":
        return anchors, mine
    return anchors, Rows(gather(mine.features, axis_name), everything)


def _batch_ids(batch: int, views: int, labels: Array | None, positives_cap: int | None) -> Ids:
    """Of all views of the global batch, sample by sample."""
    samples = jnp.arange(batch)
    ranks = jnp.zeros_like(samples)
    if positives_cap is not None and labels is not None:
        ranks = _ranks(labels)
    each = partial(jnp.repeat, repeats=views)
    return Ids(
        entry=jnp.arange(batch * views),
        sample=each(samples),
        label=each(samples if labels is None else labels),
        rank=each(ranks),
        valid=jnp.ones(batch * views, bool),
    )


def queue_rows(queue: Queue | None, labelled: bool) -> Rows | None:
    """The rows of a queue, if there is one; without labels each is a class of its own."""
    if queue is None:
        return None
    features, labels, valid = map(jnp.asarray, queue)
    nowhere = jnp.full(len(labels), -1)
    ids = Ids(
        entry=nowhere,
        sample=nowhere,
        label=labels if labelled else -1 - jnp.arange(len(labels)),
        rank=jnp.zeros_like(nowhere),
        valid=valid,
    )
    return Rows(jax.lax.stop_gradient(features), ids)


def joined(*parts: Rows) -> Rows:
    """All rows as one set, in the order of the parts."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _ranks(labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """How many of the labels before each are equal to it."""
    order = jnp.argsort(labels, stable=True)
    in_order = labels[order]
    ranks = jnp.arange(len(labels)) - jnp.searchsorted(in_order, in_order, side="left")
    return jnp.zeros_like(ranks).at[order].set(ranks)


def of_class(labels: Int[Array, " rows"], x: Num[Array, "rows ..."]) -> Num[Array, "rows ..."]:
    """For each row, the sum of x over all rows with its label."""
    _, classes = jnp.unique(labels, size=len(labels), return_inverse=True)
    return jax.ops.segment_sum(x, classes, len(labels))[classes]


def gather(
    x: Shaped[Array, "rows ..."], axis_name: AxisName | None
) -> Shaped[Array, "all_rows ..."]:
    """The rows of all devices, in the order of the devices."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _check_varies(x: Array, axis_name: AxisName | None) -> None:
    """Refuse what `shard_map` knows to be the same on all devices (`pmap` does not track it).

    Raises:
      ValueError: it is, along one axis at least.
    """
    if axis_name is None:
        return
    same = _varying(jax.lax.axis_index(axis_name)) - _varying(x)
    if same:
        raise ValueError(
            f"the batch is the same on all devices of axis {', '.join(map(repr, sorted(same)))}: "
            "pass each device its own samples (shard_map: in_specs=P(axis_name)), or leave the "
            "axis out of axis_name"
        )


def vary_with(x: Array, other: Array) -> Array:
    """x as what `shard_map` knows to differ where `other` does; its gradients are summed."""
    axes = tuple(_varying(other) - _varying(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varying(x: Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def first_sample(batch: int, axis_name: AxisName | None) -> Int[Array, ""] | int:
    """The place of the first local sample in the global batch."""
    return 0 if axis_name is None else batch * jax.lax.axis_index(axis_name)


def axis_size(axis_name: AxisName | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
