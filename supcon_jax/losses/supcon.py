"""The supervised contrastive losses of Khosla et al. (arXiv:2004.11362), as pure functions.

For an anchor i (one view of one sample), with similarities s_ia = z_i . z_a / temperature:

    A(i): every other view in the batch, on all devices
    P(i): those of A(i) with the label of i
    N(i): A(i) without P(i)

    Eq. 2, supcon_loss:     -1/|P(i)| sum_{p in P(i)} (s_ip - log D_ip)
    Eq. 3, supcon_in_loss:  -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip) / D_ip )

    denominator_mode  D_ip
    "all"             sum of exp(s_ia) over A(i), the paper's
    "one_positive"    exp(s_ip) + sum over N(i), which is SINCERE (arXiv:2309.14277)
    "only_negatives"  sum over N(i), which is the supervised form of DCL (arXiv:2110.06848)
"""

import typing
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

ContrastMode = Literal["all", "one"]
DenominatorMode = Literal["all", "one_positive", "only_negatives"]
Features = Float[Array, "batch views dim"] | Float[Array, "batch dim"]
Labels = Int[Array, " batch"]
Losses = Float[Array, " batch"]


def supcon_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "all",
    axis_name: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Supervised contrastive loss with the sum outside of the logarithm (Eq. 2).

    loss_i = -1/|P(i)| sum_{p in P(i)} (s_ip - log sum_{a in A(i)} exp(s_ia)), averaged over the
    anchor views of each sample. It is not multiplied by the temperature, and an anchor without
    positives (or with nothing in its denominator) has loss 0 and gradient 0.

    Inside `shard_map` or `pmap`, give `axis_name`: each device passes its own samples as anchors,
    all samples are gathered as the contrast set, the result stays local, and gradients reach the
    features of the other devices.

    Args:
      features: `[batch, views, dim]`, or `[batch, dim]` for one view; expected to be normalised to
        length 1 (see `l2_normalize`), though any finite values give finite results.
      labels: `[batch]` class ids. None makes every sample a class of its own: SimCLR's NT-Xent.
      temperature: positive number or scalar array; differentiable.
      contrast_mode: "all" views are anchors, or only the first ("one").
      denominator_mode: "all", "one_positive" or "only_negatives", see the top of this module.
      axis_name: mapped axis that the batch is split over.
      precision: of the similarity products; by default the highest for float32 and float64, and
        bfloat16 or float16 products accumulated in float32 for such input.

    Returns:
      One loss a sample, `[batch]`, float32 (float64 for float64 input). Take the mean, or the mean
      over samples with `num_positives(...) > 0` where some have none.

    Raises:
      ValueError: wrong ranks or sizes, unknown mode, non-positive temperature, or features that
        are the same on all devices of `axis_name`.

    References:
      Khosla et al., Supervised Contrastive Learning, 2020, https://arxiv.org/abs/2004.11362, Eq. 2.
    """
    pairs = compare(
        features, labels, contrast_mode=contrast_mode, axis_name=axis_name, precision=precision
    )
    logits = _scale(pairs.similarities, temperature)
    log_ratios = logits - _log_denominators(logits, pairs, denominator_mode)
    count = pairs.positive.sum(-1)
    total = jnp.where(_usable(pairs, denominator_mode), log_ratios, 0.0).sum(-1)
    return (-total / jnp.maximum(count, 1)).mean(-1)


def supcon_in_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "all",
    axis_name: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Supervised contrastive loss with the sum inside of the logarithm (Eq. 3).

    loss_i = -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip) / sum_{a in A(i)} exp(s_ia) ), averaged over
    the anchor views of each sample. Never larger than `supcon_loss` (Jensen's inequality); the
    paper measures 67.4 % top-1 with it where Eq. 2 gives 78.7 % (its Table 1).

    Args, result, errors and the rule for anchors without positives: as in `supcon_loss`.

    References:
      Khosla et al., Supervised Contrastive Learning, 2020, https://arxiv.org/abs/2004.11362, Eq. 3.
    """
    pairs = compare(
        features, labels, contrast_mode=contrast_mode, axis_name=axis_name, precision=precision
    )
    logits = _scale(pairs.similarities, temperature)
    log_ratios = logits - _log_denominators(logits, pairs, denominator_mode)
    usable = _usable(pairs, denominator_mode)
    log_mean = _logsumexp(log_ratios, usable) - jnp.log(jnp.maximum(pairs.positive.sum(-1), 1))
    return jnp.where(usable.any(-1), -log_mean, 0.0).mean(-1)


def num_positives(
    features: Shaped[Array, "batch ..."],
    labels: Labels | None = None,
    *,
    axis_name: str | None = None,
) -> Int[Array, " batch"]:
    """|P(i)|: how many positives each anchor view of a sample has in the global batch.

    The number is the same for all views of a sample: views x (samples of its class) - 1.

    Args:
      features: `[batch, views, dim]` or `[batch, dim]`; only the shape is used.
      labels: `[batch]` class ids, or None (every sample a class of its own).
      axis_name: mapped axis that the batch is split over.

    Returns:
      `[batch]` int32.

    Raises:
      ValueError: wrong ranks or sizes.
    """
    views = _with_views(features).shape[1]
    same = _same_class(features, labels, axis_name)
    return views * same.sum(-1, dtype=jnp.int32) - 1


def l2_normalize(x: Float[Array, "*axes dim"], epsilon: float = 1e-12) -> Float[Array, "*axes dim"]:
    """x / max(|x|, sqrt(epsilon)) along the last axis; the gradient is finite at x = 0.

    Args:
      x: any shape; 16-bit input is normalised in float32 and returned in its own type.
      epsilon: smallest squared length divided by.

    Returns:
      The shape and type of `x`, of length 1 along the last axis.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squared, epsilon))).astype(x.dtype)


class Pairs(NamedTuple):
    """Every anchor against every view of the global batch, the latter sample by sample."""

    similarities: Float[Array, "batch anchors contrast"]  # z_i . z_a, without the temperature
    positive: Bool[Array, "batch anchors contrast"]  # P(i)
    negative: Bool[Array, "batch anchors contrast"]  # N(i)


def compare(
    features: Features,
    labels: Labels | None,
    *,
    contrast_mode: ContrastMode = "all",
    axis_name: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Pairs:
    """Similarities of the anchors with the contrast set, and who is positive and negative to whom.

    Args and errors: as in `supcon_loss`.
    """
    _check_choice("contrast_mode", contrast_mode, ContrastMode)
    features = _with_views(features)
    batch, views, _ = features.shape
    anchors = features if contrast_mode == "all" else features[:, :1]
    contrast = _gather(features, axis_name)

    same_class = _same_class(features, labels, axis_name)
    same_sample = _sample_ids(batch, axis_name)[:, None] == jnp.arange(len(contrast))[None]
    same_view = jnp.arange(anchors.shape[1])[:, None] == jnp.arange(views)[None]
    itself = same_sample[:, None, :, None] & same_view[None, :, None, :]
    positive = same_class[:, None, :, None] & ~itself
    negative = jnp.broadcast_to(~same_class[:, None, :, None], itself.shape)

    flat = (batch, anchors.shape[1], -1)
    similarities = _products(anchors, contrast, precision)
    return Pairs(similarities.reshape(flat), positive.reshape(flat), negative.reshape(flat))


def _products(
    anchors: Float[Array, "batch anchors dim"],
    contrast: Float[Array, "samples views dim"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "batch anchors samples views"]:
    wide = jnp.promote_types(anchors.dtype, jnp.float32)
    if precision is None and anchors.dtype == wide:
        precision = jax.lax.Precision.HIGHEST  # the default is TF32 on GPU, bfloat16 on TPU
    return jnp.einsum(
        "bvd,cud->bvcu", anchors, contrast, precision=precision, preferred_element_type=wide
    )


def _scale(similarities: Array, temperature: float | Array) -> Array:
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return similarities / jnp.asarray(temperature, similarities.dtype)


def _log_denominators(logits: Array, pairs: Pairs, denominator_mode: DenominatorMode) -> Array:
    _check_choice("denominator_mode", denominator_mode, DenominatorMode)
    if denominator_mode == "all":
        return _logsumexp(logits, pairs.positive | pairs.negative)[..., None]
    log_negatives = _logsumexp(logits, pairs.negative)[..., None]
    if denominator_mode == "only_negatives":
        return log_negatives
    has_negatives = pairs.negative.any(-1, keepdims=True)
    return logits + jnp.where(has_negatives, jax.nn.softplus(log_negatives - logits), 0.0)


def _usable(pairs: Pairs, denominator_mode: DenominatorMode) -> Array:
    """The positives of anchors that have something in their denominator."""
    if denominator_mode == "only_negatives":
        return pairs.positive & pairs.negative.any(-1, keepdims=True)
    return pairs.positive


def _logsumexp(x: Array, where: Array) -> Array:
    """log sum exp over the last axis of the entries in `where`; 0, with gradient 0, if none is.

    The shift is the maximum over these entries only: an un-normalised anchor's product with
    itself, or a far larger entry that is not used, would push all others below the smallest float.
    """
    shift = jax.lax.stop_gradient(jnp.max(x, axis=-1, where=where, initial=-jnp.inf, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    total = jnp.sum(jnp.where(where, jnp.exp(jnp.where(where, x - shift, 0.0)), 0.0), axis=-1)
    some = where.any(-1)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + shift[..., 0], 0.0)


def _same_class(features: Array, labels: Array | None, axis_name: str | None) -> Array:
    """`[batch, global batch]`: which samples have the label of which; each has its own."""
    batch = features.shape[0]
    if labels is None:
        ids = _sample_ids(batch, axis_name)
        return ids[:, None] == jnp.arange(batch * _axis_size(axis_name))[None]
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape ({batch},), got {labels.dtype} {labels.shape}"
        )
    return labels[:, None] == _gather(labels, axis_name)[None]


def _with_views(features: Array) -> Array:
    features = jnp.asarray(features)
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise ValueError(
            f"features must be [batch, views, dim] or [batch, dim], got shape {features.shape}"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features must be floating point, got {features.dtype}")
    return features if features.ndim == 3 else features[:, None]


def _gather(x: Array, axis_name: str | None) -> Array:
    """The rows of all devices, in the order of the devices."""
    if axis_name is None:
        return x
    if _varies(jax.lax.axis_index(axis_name), axis_name) and not _varies(x, axis_name):
        raise ValueError(
            f"the batch is the same on all devices of axis {axis_name!r}: pass each device its own "
            "samples (shard_map: in_specs=P(axis)), or leave axis_name out"
        )
    return jax.lax.all_gather(x, axis_name, tiled=True)


def _varies(x: Array, axis_name: str) -> bool:
    """Whether `shard_map` tracks x as different from device to device (never under `pmap`)."""
    return axis_name in jax.typeof(x).manual_axis_type.varying


def _sample_ids(batch: int, axis_name: str | None) -> Array:
    """`[batch]`: the places of the local samples in the global batch."""
    offset = 0 if axis_name is None else batch * jax.lax.axis_index(axis_name)
    return offset + jnp.arange(batch)


def _axis_size(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
