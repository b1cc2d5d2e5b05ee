"""How the classes lie among the features: how far apart, and how close to neural collapse.

For features x of length 1 with class means m_c, c = 1 to C, and their mean m:

    within class      the mean of 1 - x . y over all pairs x, y of a class (also x = y), then over
                      the classes: 1 - mean of |m_c|^2
    between classes   the mean of 1 - x . y over the pairs of two different classes
    separation        1 - within / total, of Kornblith et al.; total is the mean of 1 - x . y over
                      all pairs, each class with the same weight: 1 - |m|^2
    NC1               tr(S_W S_B^+) / C with S_W the mean covariance within the classes and
                      S_B = 1/C sum_c (m_c - m)(m_c - m)^T; 0 where each class is one point
    NC2, equal norms  standard deviation over mean of |m_c - m|
    NC2, equal angles mean of |cos(m_c - m, m_d - m) + 1 / (C - 1)| over all c != d

Both NC2 are 0 where the class means are a simplex equiangular tight frame. Every class has the same
weight, however many images it has.

References: Kornblith et al., Why Do Better Loss Functions Lead to Less Transferable Features?,
2021, https://arxiv.org/abs/2010.16402 (class separation); Papyan, Han and Donoho, Prevalence of
Neural Collapse during the Terminal Phase of Deep Learning Training, 2020,
https://arxiv.org/abs/2008.08186 (NC1, NC2).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Features = Float[np.ndarray, "images dim"]
Labels = Int[np.ndarray, " images"]


class Separation(NamedTuple):
    """Mean cosine distances, and what the distances within classes leave of the total."""

    within: float
    between: float
    ratio: float


class Collapse(NamedTuple):
    """Measures of neural collapse; all are 0 where it is complete."""

    nc1: float
    equal_norms: float
    equal_angles: float


def class_separation(features: Features, labels: Labels) -> Separation:
    """Cosine distances within and between the classes, in time linear in the images.

    Args:
      features: `[images, dim]` of length 1.
      labels: `[images]` class ids.

    Returns:
      `within` and `between`, from 0 to 2, and `ratio`, 1 - within / total: 0 where the classes lie
      on one another, 1 where each is a point and they are not the same.

    Raises:
      ValueError: features of another length, fewer than two classes, or all features the same.
    """
    lengths = np.linalg.norm(features, axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        raise ValueError(
            "features must be of length 1 (see l2_normalize); got lengths from "
            f"{lengths.min():.3g} to {lengths.max():.3g}"
        )
    means = class_means(features, labels)
    classes = len(means)
    own = np.mean(np.sum(means**2, axis=1))
    whole = np.sum(means.mean(0) ** 2)
    if 1 - whole < 1e-9:
        raise ValueError("the features are all the same: they have no classes to be told apart")
    between = 1 - (classes * whole - own) / (classes - 1)
    return Separation(float(1 - own), float(between), float(1 - (1 - own) / (1 - whole)))


def neural_collapse(features: Features, labels: Labels) -> Collapse:
    """NC1 and both NC2, see the top of this module.

    Args:
      features: `[images, dim]`.
      labels: `[images]` class ids.

    Returns:
      Three numbers, 0 or above.

    Raises:
      ValueError: fewer than two classes, or class means that are all the same.
    """
    features = features.astype(np.float64)
    means = class_means(features, labels)
    centred = means - means.mean(0)
    if np.ptp(means, axis=0).max() < 1e-9:
        raise ValueError("the class means are all the same: nothing can be said of their angles")
    lengths = np.linalg.norm(centred, axis=1)
    units = centred / np.maximum(lengths, np.finfo(float).tiny)[:, None]
    classes = len(means)
    others = (units @ units.T)[~np.eye(classes, dtype=bool)]
    return Collapse(
        _variability(features, labels, means),
        float(lengths.std() / lengths.mean()),
        float(np.abs(others + 1 / (classes - 1)).mean()),
    )


def class_means(features: Features, labels: Labels) -> Float[np.ndarray, "classes dim"]:
    """Float64 means of the classes that there are.

    Raises:
      ValueError: fewer than two, or another number of labels than features.
    """
    if len(features) != len(labels):
        raise ValueError(f"one label a feature; got {len(features)} and {len(labels)}")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"at least two classes are compared; got {len(classes)}")
    return np.stack([features[labels == c].mean(0, dtype=np.float64) for c in classes])


def _variability(features: np.ndarray, labels: np.ndarray, means: np.ndarray) -> float:
    """tr(S_W S_B^+) / C, through the singular vectors v_r of the centred means.

    S_B^+ = sum_r C / s_r^2 v_r v_r^T, so that the trace is the sum of the variances along v_r.
    """
    centred = means - means.mean(0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    kept = scales > 1e-7 * scales[0]  # C means have at most C - 1 directions
    scales, directions = scales[kept], directions[kept]
    classes = np.unique(labels)
    along = np.mean([(features[labels == c] @ directions.T).var(0) for c in classes], axis=0)
    return float(np.sum(along / scales**2))
