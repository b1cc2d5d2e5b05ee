"""The training state: arrays only, so that a checkpoint is nothing but arrays."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import jax
import optax
from jaxtyping import Array, Key, PyTree

from supcon_jax import momentum
from supcon_jax.models import Model


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes.

    The fields are not typed more narrowly because transformations put other leaves in their place.

    Attributes:
      step: steps done in this stage, an int32 scalar.
      params: the trainable parts of {"encoder", "head"}.
      frozen: the other parts: no gradient, no optimizer state.
      batch_stats: running batch-norm statistics of all parts.
      opt_state: optimizer state of `params`.
      key: random key that all randomness of the stage comes from.
      aux: what else is carried from step to step: "average", the moving average of `params`, where
        a stage keeps one; "momentum" and "queue", see `momentum`, where it has them.
    """

    step: PyTree
    params: PyTree
    frozen: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    key: PyTree
    aux: PyTree = flax.struct.field(default_factory=dict)

    @property
    def evaluated(self) -> PyTree:
        """The trainable parameters to evaluate and to hand on: their average where there is one.

        Batch statistics have no average of their own: they are the running ones of `params`.
        """
        return self.aux.get("average", self.params)


def create_state(
    model: Model,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    image_shape: tuple[int, int, int],
    encoder: Mapping[str, Any] | None = None,
    average: bool = False,
    queue: tuple[int, int] | None = None,
) -> TrainState:
    """A fresh state, with the encoder of an earlier stage (or of a file) where one is given.

    Args:
      model: the stage's model; its `frozen` names the parts that are not trained.
      tx: optimizer.
      key: for the initial values and, folded apart, for the stage.
      image_shape: height, width and channels of a view.
      encoder: "params" and "batch_stats" of the encoder to start from, see `encoder_of`, or None.
      average: keep a moving average of the trainable parameters.
      queue: size and dimension of a queue, which comes with a momentum encoder, or None.

    Returns:
      The state at step 0.

    Raises:
      ValueError: the given encoder does not fit the model.
    """
    init_key, stage_key = jax.random.split(key)
    # Run once, so it is compiled quickly rather than well: 4 s instead of 15 s on a CPU.
    options = {"xla_backend_optimization_level": 0}
    initialize = jax.jit(partial(model.init, train=False), compiler_options=options)
    variables = initialize(init_key, jax.numpy.zeros((1, *image_shape)))
    return from_variables(model, tx, variables, stage_key, encoder, average, queue)


def from_variables(
    model: Model,
    tx: optax.GradientTransformation,
    variables: Mapping[str, Any],
    key: Key[Array, ""],
    encoder: Mapping[str, Any] | None = None,
    average: bool = False,
    queue: tuple[int, int] | None = None,
) -> TrainState:
    """The state at step 0 with the variables of `model.init`; see `create_state`."""
    params = dict(variables["params"])
    batch_stats = dict(variables.get("batch_stats", {}))
    if encoder is not None:
        _check_same(params["encoder"], encoder["params"])
        params["encoder"] = encoder["params"]
        if encoder["batch_stats"]:
            batch_stats["encoder"] = encoder["batch_stats"]
    trainable = {name: part for name, part in params.items() if name not in model.frozen}
    aux = {"average": jax.tree.map(jax.numpy.copy, trainable)} if average else {}
    return TrainState(
        step=jax.numpy.zeros((), jax.numpy.int32),
        params=trainable,
        frozen={name: part for name, part in params.items() if name in model.frozen},
        batch_stats=batch_stats,
        opt_state=tx.init(trainable),
        key=key,
        aux=aux if queue is None else {**aux, **momentum.start(trainable, *queue)},
    )


def encoder_of(state: TrainState) -> dict[str, PyTree]:
    """The encoder's "params" (averaged where the stage keeps an average) and "batch_stats"."""
    return {
        "params": merge(state.evaluated, state.frozen)["encoder"],
        "batch_stats": state.batch_stats.get("encoder", {}),
    }


def skipping(
    step: Callable[..., tuple[TrainState, dict]],
) -> Callable[..., tuple[TrainState, dict]]:
    """A training step that changes nothing but its number where its gradient is not finite.

    The optimizer's own count does not move either, so that the learning rate of later steps is that
    of one step before.

    Args:
      step: `(state, batch) -> state, metrics` with "loss" and "grad_norm".
    """

    def guarded(state: TrainState, batch: PyTree) -> tuple[TrainState, dict]:
        after, metrics = step(state, batch)
        finite = jax.numpy.isfinite(metrics["loss"]) & jax.numpy.isfinite(metrics["grad_norm"])
        parts = ("params", "batch_stats", "opt_state", "aux")
        kept = {
            name: jax.tree.map(
                partial(jax.numpy.where, finite), getattr(after, name), getattr(state, name)
            )
            for name in parts
        }
        return after.replace(**kept), metrics

    return guarded


def merge(params: PyTree, frozen: PyTree) -> PyTree:
    """All parts in one tree, for `model.apply`."""
    return {**frozen, **params}


def _check_same(expected: PyTree, found: PyTree) -> None:
    def shapes(tree: PyTree) -> set[tuple[str, tuple[int, ...]]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {(jax.tree_util.keystr(path), leaf.shape) for path, leaf in flat}

    here, there = shapes(expected), shapes(found)
    sides = (("in that encoder", there - here), ("in this model", here - there))
    differences = [
        f"{len(only)} parameters only {where}, such as "
        + ", ".join(f"{name} {shape}" for name, shape in sorted(only)[:2])
        for where, only in sides
        if only
    ]
    if differences:
        raise ValueError(
            f"the encoder to start from does not fit this model: {'; '.join(differences)}"
        )
