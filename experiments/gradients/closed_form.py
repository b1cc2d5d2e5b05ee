"""The gradient of a contrastive loss, pair by pair, in closed form (the paper's supplement, 7).

For an anchor i with the projection w_i, z_i = w_i / |w_i| and s_ia = z_i . z_a / temperature:

    dL_i/dw_i = sum_{a in A(i)} g_ia  with  g_ia = c_ia (z_a - (z_i . z_a) z_i) / |w_i|
    c_ip = (P_ip - X_ip) / temperature of a positive, c_in = P_in / temperature of a negative
    P_ia = exp(s_ia) / sum_{b in A(i)} exp(s_ib)
    X_ip = 1 / |P(i)| of L_out (Eq. 2), exp(s_ip) / sum_{q in P(i)} exp(s_iq) of L_in (Eq. 3)

so that |g_ia| = |c_ia| sqrt(1 - (z_i . z_a)^2) / |w_i|. Where the projection is not normalised,
z_i = w_i, the gradient is the sum of c_ia w_a, and the square root is gone: |c_ia| |w_a|.

References: Khosla et al., 2020, https://arxiv.org/abs/2004.11362, Eqs. 4, 5 and 16 to 24.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Matrix = Float[np.ndarray, "views views"]  # a row for each anchor i, a column for each other a


class Pairs(NamedTuple):
    """Which views are compared: row i has P(i) and N(i). What is in neither is left out of A(i)."""

    positive: Bool[np.ndarray, "views views"]
    negative: Bool[np.ndarray, "views views"]


def pairs_of(labels: Int[np.ndarray, " views"]) -> Pairs:
    """All pairs of different views: positives are those of the same label."""
    same = labels[:, None] == labels[None]
    return Pairs(same & ~np.eye(len(labels), dtype=bool), ~same)


def unit(w: Float[np.ndarray, "views dim"]) -> Float[np.ndarray, "views dim"]:
    """z = w / |w|."""
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def differences(
    z: Float[np.ndarray, "views dim"], pairs: Pairs, *, temperature: float, inside: bool
) -> Matrix:
    """P_ip - X_ip of positives, P_in of negatives, 0 elsewhere and for anchors without positives.

    Args:
      z: what the similarities are of: `unit(w)`, or w where it is not normalised.
      pairs: see `pairs_of`.
      temperature: positive.
      inside: of L_in (Eq. 3), else of L_out (Eq. 2).

    Returns:
      `[views, views]`; each row sums to 0.
    """
    similarities = z @ z.T / temperature
    compared = pairs.positive | pairs.negative
    found = _softmax(similarities, compared)
    if inside:
        expected = _softmax(similarities, pairs.positive)
    else:
        expected = pairs.positive / np.maximum(pairs.positive.sum(1, keepdims=True), 1)
    return np.where(pairs.positive.any(1, keepdims=True), found - expected, 0)


def sizes(
    w: Float[np.ndarray, "views dim"],
    pairs: Pairs,
    *,
    temperature: float,
    inside: bool,
    normalised: bool = True,
) -> Matrix:
    """|g_ia|: how long the term of each pair is in the gradient with respect to w_i.

    Args:
      w: projections before they are normalised, float64.
      pairs: see `pairs_of`.
      temperature: positive.
      inside: of L_in, else of L_out.
      normalised: the loss compares w / |w|, else w itself.

    Returns:
      `[views, views]`, 0 where two views are not compared.
    """
    z = unit(w) if normalised else w
    c = differences(z, pairs, temperature=temperature, inside=inside) / temperature
    if not normalised:
        return np.abs(c) * np.linalg.norm(w, axis=1)
    sines = np.sqrt(np.maximum(1 - (z @ z.T) ** 2, 0))
    return np.abs(c) * sines / np.linalg.norm(w, axis=1, keepdims=True)


def gradient(
    w: Float[np.ndarray, "views dim"],
    pairs: Pairs,
    *,
    temperature: float,
    inside: bool,
    normalised: bool = True,
    as_contrast: bool = False,
) -> Float[np.ndarray, "views dim"]:
    """The sum of the terms of each anchor: dL_i/dw_i, the other views held fixed.

    Args:
      w: projections before they are normalised, float64.
      pairs: see `pairs_of`.
      temperature: positive.
      inside: of L_in, else of L_out.
      normalised: the loss compares w / |w|, else w itself.
      as_contrast: add what reaches w_i where it is compared with the other anchors, which makes
        the sum the gradient of sum_j L_j.

    Returns:
      `[views, dim]`.
    """
    z = unit(w) if normalised else w
    c = differences(z, pairs, temperature=temperature, inside=inside) / temperature
    of_features = (c + c.T if as_contrast else c) @ z  # Eq. 4
    if not normalised:
        return of_features
    along = np.sum(of_features * z, axis=1, keepdims=True)  # Eq. 17: (I - z z^T) / |w|
    return (of_features - along * z) / np.linalg.norm(w, axis=1, keepdims=True)


def thinned(
    mask: Bool[np.ndarray, "views views"], share: float, order: Matrix
) -> Bool[np.ndarray, "views views"]:
    """A share of the pairs of each row, at least one, the first in a given order.

    Args:
      mask: the pairs.
      share: of each row's that is kept, above 0.
      order: the pairs with the smallest numbers stay; smaller shares are inside larger ones.

    Returns:
      The mask with fewer pairs.
    """
    ranks = np.argsort(np.argsort(np.where(mask, order, np.inf), axis=1), axis=1)
    return mask & (ranks < np.ceil(share * mask.sum(1, keepdims=True)))


def _softmax(x: Matrix, where: Bool[np.ndarray, "views views"]) -> Matrix:
    """Over the entries of each row in `where`; 0 elsewhere, and in rows without any."""
    largest = np.max(x, axis=1, where=where, initial=-np.inf, keepdims=True)
    powers = np.where(where, np.exp(np.minimum(x - largest, 0)), 0)
    return powers / np.maximum(powers.sum(1, keepdims=True), np.finfo(x.dtype).tiny)
