"""One training step and one evaluation step: pure functions of the state and the batch.

Everything here is the view of one device; `parallel.data_parallel` maps it over the mesh.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from supcon_jax.micro_batches import gradient_of
from supcon_jax.models import Model
from supcon_jax.objectives import Metrics, Objective
from supcon_jax.optimizers import update_average
from supcon_jax.state import TrainState, merge

Batch = Mapping[str, Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    objective: Objective,
    augment: Callable[[Array, Batch], Array],
    loss_scale: float = 1.0,
    micro_batches: int = 1,
    independent: bool = False,
    unroll: bool = False,
    average: float = 0.0,
    follow: Callable[..., dict[str, Any]] | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Augment, forward, loss, gradient, update.

    Args:
      state: the same on all devices.
      batch: this device's part: "image" `[b, s, H, W, C]` uint8, "label" `[b]`, and "position"
        `[b]`, the places of the examples in the global batch.
      model: encoder and head.
      tx: optimizer of `state.params`.
      objective: see `objectives`.
      augment: `(keys [b], batch) -> views [b, v, h, w, c]`.
      loss_scale: factor on the loss that is differentiated; the reported one is without it.
      micro_batches: parts of the batch whose activations are held one after the other.
      independent: the objective's examples do not see each other, see `micro_batches.gradient_of`.
      unroll: of the micro-batches, see there.
      average: decay of the moving average of the parameters, see `update_average`; 0 for none.
      follow: rule of the momentum encoder and its queue, see `momentum.follow`; the views after
        the first pass through that encoder. None: no such encoder.
      axis_name: mapped axis that the batch is split over, or None.

    Returns:
      The next state, and the metrics "loss", "grad_norm" and the objective's, over all devices.
    """

    def means(weighted: Metrics) -> dict[str, Array]:
        sums = {k: (jnp.sum(values * w), jnp.sum(w)) for k, (values, w) in weighted.items()}
        sums = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        return {k: total / jnp.maximum(count, 1) for k, (total, count) in sums.items()}

    def encode(params: PyTree, batch_stats: PyTree, part: Batch) -> tuple[Array, PyTree]:
        views = augment(example_keys(state, part["position"]), part)
        variables = {"params": merge(params, state.frozen), "batch_stats": batch_stats}
        if follow is None:
            return forward(model, variables, views)
        queries, batch_stats = forward(model, variables, views[:, :1])
        variables["params"] = merge(state.aux["momentum"], state.frozen)
        keys, _ = forward(model, variables, views[:, 1:])
        return jnp.concatenate([queries, jax.lax.stop_gradient(keys)], 1), batch_stats

    def scaled_loss(outputs: Array, part: Batch) -> tuple[Array, dict[str, Array]]:
        losses, weights, metrics = objective(outputs, part, {**state.aux, "step": state.step})
        measured = means({"loss": (losses, weights), **jax.lax.stop_gradient(metrics)})
        return loss_scale * measured["loss"], measured

    parts = partial(
        gradient_of, micro_batches=micro_batches, independent=independent, unroll=unroll
    )
    gradient = parts(encode, scaled_loss, axis_name)
    grads, (metrics, outputs, batch_stats) = gradient(state.params, state.batch_stats, batch)
    if axis_name is not None:  # local batch norm: the running statistics are averaged
        batch_stats = jax.lax.pmean(batch_stats, axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params, aux = optax.apply_updates(state.params, updates), state.aux
    if average:
        aux = {**aux, "average": update_average(aux["average"], params, average, state.step)}
    if follow is not None:
        aux = follow(aux, params, outputs[:, 1:], batch["label"], state.step, axis_name=axis_name)

    metrics["grad_norm"] = optax.tree.norm(grads) / loss_scale
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, aux=aux
    )
    return state, metrics


def eval_step(
    state: TrainState, batch: Batch, *, model: Model, preprocess: Callable[[Array], Array]
) -> dict[str, Array]:
    """Features and outputs of un-augmented images, in inference mode.

    Args:
      state: the same on all devices.
      batch: this device's part, with "image" `[b, s, H, W, C]` uint8.
      model: encoder and head.
      preprocess: `images -> [b, h, w, c]`.

    Returns:
      "features" `[b, features]` (the encoder's) and "outputs" `[b, outputs]`, float32.
    """
    variables = {"params": merge(state.evaluated, state.frozen), "batch_stats": state.batch_stats}
    applied: Any = model.apply(variables, preprocess(batch["image"]), train=False)
    features, outputs = applied
    return {"features": features.astype(jnp.float32), "outputs": outputs.astype(jnp.float32)}


def forward(
    model: Model, variables: Mapping[str, PyTree], views: Float[Array, "b v h w c"]
) -> tuple[Float[Array, "b v k"], PyTree]:
    """Outputs of all views, in training mode, and the running batch statistics after them."""
    flat = views.reshape(-1, *views.shape[2:])
    (_, outputs), updated = model.apply(variables, flat, train=True, mutable=["batch_stats"])
    batch_stats = {**variables["batch_stats"], **updated.get("batch_stats", {})}
    return outputs.reshape(*views.shape[:2], -1), batch_stats


def example_keys(state: TrainState, positions: Array) -> Any:
    """One key an example, from the stage, the step and the place in the global batch alone."""
    step_key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)
