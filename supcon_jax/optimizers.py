"""Schedules and optimizers, from optax, with every length in steps."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree


def cosine_schedule(
    learning_rate: float, *, steps: int, warmup_steps: int, final_ratio: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine down to `final_ratio` of the peak.

    Args:
      learning_rate: the peak.
      steps: of the whole stage.
      warmup_steps: of them; 0 starts at the peak.
      final_ratio: last learning rate over the peak.

    Returns:
      `step -> learning rate`.

    Raises:
      ValueError: a warm-up longer than the stage.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"warm-up must be shorter than the stage: {warmup_steps} of {steps} steps")
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate if warmup_steps == 0 else 0.0,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, 1),
        end_value=final_ratio * learning_rate,
    )


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_all: bool = False,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum; weight decay is part of the gradient (L2).

    v = momentum v + (g + weight_decay w); w -= learning_rate v

    Args:
      schedule: `step -> learning rate`.
      momentum: decay of v.
      nesterov: look one step ahead.
      weight_decay: factor on the weights.
      decay_all: also decay biases and batch-norm scales, not the kernels alone.

    Returns:
      An optax transformation.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, None if decay_all else kernels_only),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def kernels_only(params: PyTree) -> PyTree:
    """True for the leaves named "kernel": no biases, no batch-norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd}
SCHEDULES: dict[str, Callable[..., Any]] = {"cosine": cosine_schedule}
