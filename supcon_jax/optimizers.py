"""Schedules and optimizers, from optax, with every length in steps."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

SCHEDULES = ("cosine", "exponential", "step", "constant")

# Each optimizer with the kinds of weight decay that it can have.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("l2", "decoupled"),
    "nesterov": ("l2", "decoupled"),
    "lars": ("lars",),
    "rmsprop": ("l2", "decoupled"),
    "adamw": ("decoupled",),
}

# What weight decay and LARS leave out, as patterns of "/"-joined paths of parameters.
EXCLUDE: dict[str, tuple[str, ...]] = {
    "none": (),
    "norm": (r"(?i)norm[^/]*/(scale|bias)$",),  # of batch and layer norm; other biases are in
    "norm_and_bias": (r"(^|/)(?!kernel$)[^/]*$",),  # all but the kernels
}


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    final_ratio: float = 0.0,
    decay_rate: float = 0.1,
    decay_steps: float = 1,
    boundaries: Sequence[int] = (),
) -> optax.Schedule:
    """Linear warm-up to the peak, then a decay; 0 after the stage.

    At t = step - warmup_steps >= 0, with T = steps - warmup_steps, the peak is multiplied by

    - cosine: final_ratio + (1 - final_ratio) (1 + cos(pi t / T)) / 2;
    - exponential: decay_rate ^ floor(t / decay_steps), a staircase;
    - step: decay_rate ^ (number of boundaries below t), so a boundary still has the old value;
    - constant: 1.

    Args:
      name: "cosine", "exponential", "step" or "constant"; what it has no use for is ignored.
      learning_rate: the peak.
      steps: of the whole stage.
      warmup_steps: of them; 0 starts at the peak.
      warmup_start: learning rate at step 0 of the warm-up.
      final_ratio: last learning rate over the peak.
      decay_rate: factor at each drop.
      decay_steps: from drop to drop; a fraction is kept, so that the drops do not drift.
      boundaries: last steps before the drops, counted from the end of the warm-up.

    Returns:
      `step -> learning rate`.

    Raises:
      ValueError: unknown name or a value out of range.

    References:
      https://github.com/google-research/google-research/tree/master/supcon (utils.py).
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warm-up must be shorter than the stage: {warmup_steps} of {steps} steps")
    _require(learning_rate >= 0, "learning_rate", "0 or more", learning_rate)
    below_peak = f"from 0 to the peak {learning_rate}"
    _require(0 <= warmup_start <= learning_rate, "warmup_start", below_peak, warmup_start)
    warmup = optax.linear_schedule(warmup_start, learning_rate, max(warmup_steps, 1))
    options = (final_ratio, decay_rate, decay_steps, boundaries)
    decay = _decay(name, learning_rate, steps - warmup_steps, *options)
    after = optax.constant_schedule(0.0)
    return optax.join_schedules([warmup, decay, after], [warmup_steps, steps + 1])


def _decay(
    name: str,
    learning_rate: float,
    steps: int,
    final_ratio: float,
    decay_rate: float,
    decay_steps: float,
    boundaries: Sequence[int],
) -> optax.Schedule:
    """What follows the warm-up, with steps counted from its end."""
    _require(name in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", name)
    _require(0 <= final_ratio <= 1, "final_ratio", "from 0 to 1", final_ratio)
    _require(0 < decay_rate <= 1, "decay_rate", "above 0 and at most 1", decay_rate)
    _require(decay_steps >= 1, "decay_steps", "1 or more", decay_steps)
    increasing = all(a < b for a, b in pairwise((-1, *boundaries)))
    _require(increasing, "boundaries", "increasing steps, 0 or more", tuple(boundaries))
    if name == "cosine":
        return optax.cosine_decay_schedule(learning_rate, steps, final_ratio)
    if name == "exponential":
        return _staircase(learning_rate, decay_rate, _multiples(decay_steps, steps))
    if name == "step":
        return _staircase(learning_rate, decay_rate, [boundary + 1 for boundary in boundaries])
    return optax.constant_schedule(learning_rate)


def _multiples(length: float, end: int) -> list[int]:
    """First steps at or after 1, 2, ... times a length, up to an end."""
    multiples = np.arange(1, int(end / length) + 1) * length
    return np.ceil(np.round(multiples, 6)).astype(int).tolist()  # 0.14 * 100 is above 14


def _staircase(learning_rate: float, decay_rate: float, drops: Sequence[int]) -> optax.Schedule:
    """The learning rate times `decay_rate` at each of the increasing steps `drops`.

    By looking up a table: floor(t / length) under jit is a step late at some lengths, as XLA
    multiplies by the rounded inverse.
    """
    rates = learning_rate * decay_rate ** np.arange(len(drops) + 1)
    steps = np.asarray(drops, np.int32)
    return lambda step: jnp.asarray(rates)[
        jnp.searchsorted(steps, step, side="right", method="compare_all")
    ]


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    decay: float = 0.9,
    epsilon: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    trust_coefficient: float = 1e-3,
    weight_decay: float = 0.0,
    weight_decay_kind: str = "l2",
    clip_norm: float = 0.0,
    exclude: str | Sequence[str] = "norm_and_bias",
) -> optax.GradientTransformation:
    """The update of the weights w from their gradient g at learning rate r.

    - sgd: v = momentum v + g; w -= r v.
    - nesterov: v = momentum v + g; w -= r (g + momentum v).
    - lars: v = momentum v + r trust g; w -= v, where each parameter has
      trust = trust_coefficient |w| / |g|, or 1 if it is excluded or a norm is 0.
    - rmsprop: s = decay s + (1 - decay) g^2, from s = 1; v = momentum v + r g / sqrt(s + epsilon);
      w -= v. PyTorch starts from s = 0, has epsilon outside of the root and r outside of v.
    - adamw: Adam with `betas` and `epsilon` outside of the root.

    Weight decay is added to the gradient before all this (g += weight_decay w) where it is "l2", or
    "lars", which is the same before LARS' trust ratio; "decoupled" is w -= r weight_decay w beside
    it. A part of the model that a stage freezes has no gradient and needs no exclusion.

    Args:
      name: "sgd", "nesterov", "lars", "rmsprop" or "adamw"; what it has no use for is ignored.
      schedule: `step -> learning rate`.
      momentum: decay of v.
      decay: of RMSProp's mean square.
      epsilon: of RMSProp (the authors: 1e-3 for the linear stage) and AdamW (usually 1e-8).
      betas: decays of AdamW's two moments.
      trust_coefficient: of LARS.
      weight_decay: factor on the weights.
      weight_decay_kind: "l2" or "decoupled" for sgd, nesterov and rmsprop; "lars" for lars;
        "decoupled" for adamw.
      clip_norm: the gradient of all parameters together, before all else, is shortened to this
        Euclidean norm where it is longer: g *= min(1, clip_norm / |g|); 0: never.
      exclude: what is neither decayed nor adapted by LARS: "none", "norm" (scale and bias of batch
        and layer norm; the authors' choice), "norm_and_bias" (all but kernels), or regular
        expressions to search in paths such as "encoder/norm_stem/scale".

    Returns:
      An optax transformation; its state is arrays only.

    Raises:
      ValueError: unknown name, a kind of decay that the optimizer does not have, or a value out of
        range.

    References:
      You et al., 2017, https://arxiv.org/abs/1708.03888 (LARS); Loshchilov and Hutter, 2017,
      https://arxiv.org/abs/1711.05101 (AdamW);
      https://github.com/google-research/google-research/tree/master/supcon (utils.py).
    """
    _require(name in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", name)
    kinds, kind = OPTIMIZERS[name], weight_decay_kind
    _require(kind in kinds, f"weight_decay_kind of {name}", " or ".join(kinds), kind)
    for field, value in (("momentum", momentum), ("decay", decay), *(("betas", b) for b in betas)):
        _require(0 <= value < 1, field, "from 0 to below 1", value)
    for field, value in (
        ("epsilon", epsilon),
        ("weight_decay", weight_decay),
        ("clip_norm", clip_norm),
    ):
        _require(value >= 0, field, "0 or more", value)
    _require(trust_coefficient > 0, "trust_coefficient", "positive", trust_coefficient)
    included = _included(exclude)
    rules = {
        "sgd": optax.sgd(schedule, momentum),
        "nesterov": optax.sgd(schedule, momentum, nesterov=True),
        "lars": optax.lars(
            schedule,
            trust_coefficient=trust_coefficient,
            trust_ratio_mask=included,
            momentum=momentum,
        ),
        "rmsprop": optax.rmsprop(schedule, decay, epsilon, initial_scale=1.0, momentum=momentum),
        "adamw": optax.adam(schedule, *betas, epsilon),
    }
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if kind == "decoupled":
        shrink = optax.add_decayed_weights(lambda step: -weight_decay * schedule(step), included)
        return optax.chain(*clip, rules[name], shrink)
    return optax.chain(*clip, optax.add_decayed_weights(weight_decay, included), rules[name])


def _included(exclude: str | Sequence[str]) -> Callable[[PyTree], PyTree]:
    """A function from parameters to a tree of booleans: False where a pattern is found."""
    if isinstance(exclude, str):
        _require(exclude in EXCLUDE, "exclude", f"one of {', '.join(EXCLUDE)}", exclude)
        exclude = EXCLUDE[exclude]

    def is_included(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not any(re.search(pattern, name) for pattern in exclude)

    return partial(jax.tree_util.tree_map_with_path, is_included)


def update_average(
    average: PyTree, params: PyTree, decay: float, step: int | Int[Array, ""]
) -> PyTree:
    """Exponential moving average of parameters: d average + (1 - d) params.

    At step t, d = min(decay, (1 + t) / (10 + t)), so that the random initial values are gone (1e-5
    of them is left) after ten steps. The average is over about the last (10 + t) / 9 steps until
    d is the decay, from step (10 decay - 1) / (1 - decay) on: 890 for 0.99, 89,990 for 0.9999.

    Args:
      average: what it was, a tree as `params`.
      params: after the step.
      decay: from 0 (the parameters themselves) to below 1.
      step: t, the steps done before this one.

    Returns:
      The new average, a tree as `params`.

    References:
      Polyak and Juditsky, 1992, https://epubs.siam.org/doi/10.1137/0330046; `num_updates` of
      https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, average, 1.0 - decay_now)


def _require(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{field} must be {expected}; got {value!r}")
