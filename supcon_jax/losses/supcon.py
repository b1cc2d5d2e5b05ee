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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from supcon_jax.losses import blockwise, symmetric
from supcon_jax.losses.arguments import (
    BlockSize,
    check_choice,
    check_exchange,
    check_labels,
    check_queue,
    check_temperature,
    choose_block_size,
    kept_samples,
    mask_weights,
    with_views,
)
from supcon_jax.losses.pairs import (
    AxisName,
    ContrastMode,
    DenominatorMode,
    Exchange,
    Features,
    Labels,
    Mask,
    Queue,
    Relation,
    Rows,
    Weights,
    arrange,
    joined,
    precision_of,
    products,
    queue_rows,
    relate,
    vary_with,
)

Losses = Float[Array, " batch"]


def supcon_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "all",
    positives_cap: int | None = None,
    mask: Mask | None = None,
    queue: Queue | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
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
      positives_cap: at most so many positives beside the anchor's own other views, a multiple of
        the views: those of the first samples of the class in the global batch. The others leave
        the denominator too. None: all.
      mask: `[batch, global_batch]` weights >= 0 in place of labels: w[b, c] is that of the views of
        sample c as positives of sample b, w[b, b] that of b's own other views. Positives are those
        of weight above 0, all others negatives. Rows are local, columns global; need not be
        symmetric; has no gradient. Eq. 2 becomes -sum w (s - log D) / sum w.
      queue: `(features [queue, dim], labels [queue], valid [queue])`, more rows of the contrast
        set, the same on all devices; never anchors, without gradient. Without labels (or with a
        mask) they are all negatives.
      axis_name: mapped axis that the batch is split over, or a tuple of axes.
      exchange: "gather" holds the features of all devices on each; "ring" passes them around, so
        that each device holds one other part at a time (in blocks; without a mask).
      block_size: None compares all pairs at once. A number does so in blocks of so many anchors and
        rows, in memory linear in the batch, with the same value and gradient. "auto" takes blocks
        of 1024 where the similarities of this device, with those to the queue, would need more
        than 256 MiB.
      precision: of the similarity products; by default the highest for float32 and float64, and
        bfloat16 or float16 products accumulated in float32 for such input.

    Returns:
      One loss a sample, `[batch]`, float32 (float64 for float64 input). Take the mean, or the mean
      over samples with `num_positives(...) > 0` where some have none.

    Raises:
      ValueError: wrong ranks or sizes, unknown mode, non-positive temperature, a cap that is no
        multiple of the views, a mask beside labels, a cap or the ring, a cap beside a queue,
        labels that JAX would wrap around (beyond int32), or features that are the same on all
        devices of `axis_name`.

    References:
      Khosla et al., Supervised Contrastive Learning, 2020, https://arxiv.org/abs/2004.11362, Eq. 2.
    """
    return contrastive_losses(
        features,
        labels,
        inside=False,
        temperature=temperature,
        contrast_mode=contrast_mode,
        denominator_mode=denominator_mode,
        positives_cap=positives_cap,
        mask=mask,
        queue=queue,
        axis_name=axis_name,
        exchange=exchange,
        block_size=block_size,
        precision=precision,
    )


def supcon_in_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "all",
    positives_cap: int | None = None,
    mask: Mask | None = None,
    queue: Queue | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
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
    return contrastive_losses(
        features,
        labels,
        inside=True,
        temperature=temperature,
        contrast_mode=contrast_mode,
        denominator_mode=denominator_mode,
        positives_cap=positives_cap,
        mask=mask,
        queue=queue,
        axis_name=axis_name,
        exchange=exchange,
        block_size=block_size,
        precision=precision,
    )


def contrastive_losses(
    features: Features,
    labels: Labels | None,
    *,
    inside: bool = False,
    epsilon: float = 0.0,
    beta: float = 0.0,
    temperature: float | Array,
    contrast_mode: ContrastMode,
    denominator_mode: DenominatorMode,
    positives_cap: int | None,
    mask: Array | None,
    queue: Queue | None,
    axis_name: AxisName | None,
    exchange: Exchange,
    block_size: BlockSize,
    precision: jax.lax.PrecisionLike,
) -> Losses:
    """All losses of this family: checks, who is compared with whom, and dense or in blocks.

    `inside` is Eq. 3 instead of Eq. 2; `epsilon` and `beta` are those of `losses.variants`.
    """
    features = with_views(features)
    batch, views, _ = features.shape
    check_choice("contrast_mode", contrast_mode, ContrastMode)
    check_choice("denominator_mode", denominator_mode, DenominatorMode)
    check_exchange(exchange, axis_name)
    check_temperature(temperature)
    check_queue(queue, features, positives_cap)
    labels = check_labels(batch, labels)
    weights = mask_weights(mask, labels, batch, positives_cap, exchange, axis_name)
    kept = kept_samples(positives_cap, views)
    anchors, contrast = arrange(
        features,
        labels,
        contrast_mode=contrast_mode,
        positives_cap=positives_cap,
        axis_name=axis_name,
        exchange=exchange,
    )
    extra = queue_rows(queue, labelled=labels is not None)
    plan = blockwise.Plan(
        inside=inside,
        epsilon=epsilon,
        beta=beta,
        denominator_mode=denominator_mode,
        kept=kept,
        block_size=choose_block_size(block_size, anchors, contrast, extra, exchange),
        precision=precision_of(precision, features),
        ring=axis_name if exchange == "ring" else None,
    )
    scale = 1 / jnp.asarray(temperature, jnp.promote_types(features.dtype, jnp.float32))
    if plan.block_size is None:
        everything = contrast if extra is None else joined(contrast, extra)
        values = _dense(plan, anchors, everything, scale, weights)
    else:
        compared = blockwise.Compared(anchors.ids, contrast.ids, weights, extra)
        whole = axis_name is None and contrast_mode == "all"
        scale = vary_with(scale, features)
        values = symmetric.losses_in_blocks(plan, anchors, contrast, scale, compared, whole)
    return values.reshape(batch, -1).mean(-1)


def _dense(
    plan: blockwise.Plan, anchors: Rows, contrast: Rows, scale: Array, weights: Weights | None
) -> Float[Array, " anchors"]:
    """The loss of each anchor, with all pairs held at once."""
    relation = relate(anchors.ids, contrast.ids, plan.kept, weights, scale.dtype)
    logits = scale * products(anchors.features, contrast.features, plan.precision)
    log_ratios = logits - _log_denominators(plan, logits, relation)
    usable = _usable(relation, plan.denominator_mode)
    count = relation.weight.sum(-1)
    count = jnp.where(count > 0, count, 1)
    if plan.inside:
        log_weights = jnp.log(jnp.where(usable, relation.weight, 1))
        log_mean = _logsumexp(log_ratios + log_weights, usable) - jnp.log(count)
        return jnp.where(usable.any(-1), -log_mean, 0)
    return jnp.where(usable, relation.weight * -log_ratios, 0).sum(-1) / count


def _log_denominators(plan: blockwise.Plan, logits: Array, relation: Relation) -> Array:
    pushed = _harder(plan.beta, logits, relation.negative) if plan.beta else logits
    if plan.denominator_mode == "all":
        return _logsumexp(pushed, relation.positive | relation.negative)[..., None]
    log_negatives = _logsumexp(pushed, relation.negative)[..., None]
    if plan.denominator_mode == "only_negatives":
        return log_negatives
    own = logits - plan.epsilon
    has_negatives = relation.negative.any(-1, keepdims=True)
    return own + jnp.where(has_negatives, jax.nn.softplus(log_negatives - own), 0.0)


def _harder(beta: float, logits: Array, negative: Array) -> Array:
    """Negatives times e^(beta s) over its mean, which has no gradient."""
    tilt = jax.lax.stop_gradient(beta * logits)
    log_mean = _logsumexp(tilt, negative) - jnp.log(jnp.maximum(negative.sum(-1), 1))
    return jnp.where(negative, logits + tilt - log_mean[..., None], logits)


def _usable(relation: Relation, denominator_mode: DenominatorMode) -> Array:
    """The positives of anchors that have something in their denominator."""
    if denominator_mode == "only_negatives":
        return relation.positive & relation.negative.any(-1, keepdims=True)
    return relation.positive


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
