"""The training state: arrays only, so that a checkpoint is nothing but arrays."""

from functools import partial

import flax
import jax
import optax
from jaxtyping import Array, Key, PyTree

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
      aux: what an objective carries from step to step; empty for the present ones.
    """

    step: PyTree
    params: PyTree
    frozen: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    key: PyTree
    aux: PyTree = flax.struct.field(default_factory=dict)


def create_state(
    model: Model,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    image_shape: tuple[int, int, int],
    previous: TrainState | None = None,
) -> TrainState:
    """A fresh state, with the encoder of an earlier stage where one is given.

    Args:
      model: the stage's model; its `frozen` names the parts that are not trained.
      tx: optimizer.
      key: for the initial values and, folded apart, for the stage.
      image_shape: height, width and channels of a view.
      previous: last state of the stage whose encoder this one starts from, or None.

    Returns:
      The state at step 0.

    Raises:
      ValueError: the encoder of the earlier stage does not fit the model.
    """
    init_key, stage_key = jax.random.split(key)
    # Run once, so it is compiled quickly rather than well: 4 s instead of 15 s on a CPU.
    options = {"xla_backend_optimization_level": 0}
    initialize = jax.jit(partial(model.init, train=False), compiler_options=options)
    variables = initialize(init_key, jax.numpy.zeros((1, *image_shape)))
    params = dict(variables["params"])
    batch_stats = dict(variables.get("batch_stats", {}))
    if previous is not None:
        earlier = merge(previous.params, previous.frozen)["encoder"]
        _check_same(params["encoder"], earlier)
        params["encoder"] = earlier
        batch_stats["encoder"] = previous.batch_stats["encoder"]
    trainable = {name: part for name, part in params.items() if name not in model.frozen}
    return TrainState(
        step=jax.numpy.zeros((), jax.numpy.int32),
        params=trainable,
        frozen={name: part for name, part in params.items() if name in model.frozen},
        batch_stats=batch_stats,
        opt_state=tx.init(trainable),
        key=stage_key,
    )


def merge(params: PyTree, frozen: PyTree) -> PyTree:
    """All parts in one tree, for `model.apply`."""
    return {**frozen, **params}


def _check_same(expected: PyTree, found: PyTree) -> None:
    def shapes(tree: PyTree) -> set[tuple[str, tuple[int, ...]]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {(jax.tree_util.keystr(path), leaf.shape) for path, leaf in flat}

    differing = sorted(shapes(expected) ^ shapes(found))
    if differing:
        names = ", ".join(f"{name} {shape}" for name, shape in differing[:4])
        raise ValueError(
            f"the encoder of the stage before does not fit this model: {len(differing)} parameters "
            f"differ, such as {names}"
        )
