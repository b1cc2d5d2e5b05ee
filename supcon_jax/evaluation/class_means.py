"""Nearest class mean: the classifier without anything to choose."""

import numpy as np
from jaxtyping import Float, Int


def nearest_class_mean(
    features: Float[np.ndarray, "queries dim"],
    references: Float[np.ndarray, "references dim"],
    labels: Int[np.ndarray, " references"],
) -> Int[np.ndarray, " queries"]:
    """The class whose mean reference has the largest cosine with the query.

        argmax_c cos(x, m_c)  with  m_c = mean of r / |r| over the references r of class c

    The lengths of features and references do not matter, nor do the sizes of the classes. Where
    cosines are equal, the smallest class id wins.

    Args:
      features: `[queries, dim]`, normalised or not.
      references: `[references, dim]`, normalised or not; one of length 0 counts as 0 in its mean.
      labels: `[references]` class ids; classes without references are never predicted.

    Returns:
      `[queries]` predicted class ids.

    Raises:
      ValueError: no references, or sizes that do not match.

    References:
      Mensink et al., Distance-Based Image Classification: Generalizing to New Classes at Near-Zero
      Cost, 2013, section 3.2; with the cosine as in Rebuffi et al., iCaRL, 2017,
      https://arxiv.org/abs/1611.07725, section 2.1.
    """
    check_references(features, references, labels)
    classes = np.unique(labels)
    means = np.stack([_unit(references[labels == c]).mean(axis=0) for c in classes])
    return classes[(features @ _unit(means).T).argmax(axis=-1)]


def check_references(features: np.ndarray, references: np.ndarray, labels: np.ndarray) -> None:
    """Labelled references, and queries of their dimension.

    Raises:
      ValueError: no references, or sizes that do not match.
    """
    if len(references) == 0 or len(references) != len(labels):
        raise ValueError(
            "references need at least one row and one label a row; got "
            f"{len(references)} rows and {len(labels)} labels"
        )
    if features.shape[-1] != references.shape[-1]:
        raise ValueError(
            "queries and references must be features of the same encoder; got "
            f"{features.shape[-1]} and {references.shape[-1]} dimensions"
        )


def _unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1)
