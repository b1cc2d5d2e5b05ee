"""Siblings of the supervised contrastive loss that change its formula.

Notation, arguments that are not explained here, errors and the rule for anchors without positives:
as in `losses.supcon`.
"""

import jax
from jaxtyping import Array, Num

from supcon_jax.losses.arguments import BlockSize, not_negative
from supcon_jax.losses.pairs import (
    AxisName,
    ContrastMode,
    DenominatorMode,
    Exchange,
    Features,
    Labels,
    Mask,
    Queue,
)
from supcon_jax.losses.supcon import Losses, contrastive_losses


def epsilon_sup_infonce_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    epsilon: float = 0.25,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    positives_cap: int | None = None,
    mask: Mask | None = None,
    queue: Queue | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Epsilon-SupInfoNCE: positives are to be closer than negatives by a margin.

    loss_i = -1/|P(i)| sum_{p in P(i)} (s_ip - log D_ip)
    D_ip = exp(s_ip - epsilon) + sum_{n in N(i)} exp(s_in)

    With epsilon 0 it is `supcon_loss` with `denominator_mode="one_positive"` (SINCERE). It can be
    negative: its floor is -epsilon.

    Args:
      features: as in `supcon_loss`.
      labels: as in `supcon_loss`.
      epsilon: margin >= 0 in the units of s, after the temperature: a margin m between cosines is
        epsilon = m / temperature.
      temperature: as in `supcon_loss`.
      contrast_mode: as in `supcon_loss`.
      positives_cap: as in `supcon_loss`.
      mask: as in `supcon_loss`.
      queue: as in `supcon_loss`.
      axis_name: as in `supcon_loss`.
      exchange: as in `supcon_loss`.
      block_size: as in `supcon_loss`.
      precision: as in `supcon_loss`.

    Returns:
      One loss a sample, `[batch]`.

    Raises:
      ValueError: negative epsilon, and as `supcon_loss`.

    References:
      Barbano et al., Unbiased Supervised Contrastive Learning, 2023,
      https://arxiv.org/abs/2211.05568.
    """
    return contrastive_losses(
        features,
        labels,
        epsilon=not_negative("epsilon", epsilon),
        temperature=temperature,
        contrast_mode=contrast_mode,
        denominator_mode="one_positive",
        positives_cap=positives_cap,
        mask=mask,
        queue=queue,
        axis_name=axis_name,
        exchange=exchange,
        block_size=block_size,
        precision=precision,
    )


def hard_negative_loss(
    features: Features,
    labels: Labels | None = None,
    *,
    beta: float = 1.0,
    temperature: float | Num[Array, ""] = 0.1,
    contrast_mode: ContrastMode = "all",
    denominator_mode: DenominatorMode = "one_positive",
    positives_cap: int | None = None,
    mask: Mask | None = None,
    queue: Queue | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange = "gather",
    block_size: BlockSize = None,
    precision: jax.lax.PrecisionLike = None,
) -> Losses:
    """Supervised contrastive loss whose negatives count the more, the more similar they are.

    Eq. 2 with w_in exp(s_in) in place of exp(s_in) for the negatives, in the denominator that
    `denominator_mode` says; "one_positive" is H-SCL's:

        loss_i = -1/|P(i)| sum_{p in P(i)} (s_ip - log D_ip)
        D_ip = exp(s_ip) + sum_{n in N(i)} w_in exp(s_in)
        w_in = |N(i)| exp(beta s_in) / sum_{m in N(i)} exp(beta s_im)

    The weights have mean 1 over the negatives of an anchor, and no gradient. With beta 0 they are
    all 1, which is `supcon_loss` with the same `denominator_mode`.

    Args:
      features: as in `supcon_loss`.
      labels: as in `supcon_loss`.
      beta: hardness >= 0; s in the weights is divided by the temperature.
      temperature: as in `supcon_loss`.
      contrast_mode: as in `supcon_loss`.
      positives_cap: as in `supcon_loss`.
      mask: as in `supcon_loss`.
      queue: as in `supcon_loss`.
      axis_name: as in `supcon_loss`.
      exchange: as in `supcon_loss`.
      block_size: as in `supcon_loss`.
      precision: as in `supcon_loss`.
      denominator_mode: "all", "one_positive" or "only_negatives", see `losses.supcon`.

    Returns:
      One loss a sample, `[batch]`.

    Raises:
      ValueError: negative beta, and as `supcon_loss`.

    References:
      Jiang et al., Supervised Contrastive Learning with Hard Negative Samples, 2022,
      https://arxiv.org/abs/2209.00078; the weights after Robinson et al., 2021,
      https://arxiv.org/abs/2010.04592.
    """
    return contrastive_losses(
        features,
        labels,
        beta=not_negative("beta", beta),
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
