"""Which classes are recognised, and which are taken for which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from supcon_jax.terminal import shown

NUMBERED = 20  # most classes whose cells have numbers
NAMED = 120  # most classes whose rows and columns have names
PAIRS = 25  # most confused pairs that a picture lists


class Confused(NamedTuple):
    """Images of one class that were taken for another."""

    label: int
    predicted: int
    images: int
    share: float  # of the images of the class


def confusion_matrix(
    predicted: Int[np.ndarray, " images"], labels: Int[np.ndarray, " images"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Images by class (rows) and prediction (columns).

    Args:
      predicted: `[images]` class ids.
      labels: `[images]` class ids.
      classes: number of classes; all ids are below it.

    Returns:
      `[classes, classes]` counts, which sum to the number of images.

    Raises:
      ValueError: different numbers of predictions and labels, or an id out of range.
    """
    if len(predicted) != len(labels):
        raise ValueError(
            f"one prediction an image is needed; got {len(predicted)} for {len(labels)} labels"
        )
    for name, ids in (("predicted", predicted), ("labels", labels)):
        outside = ids[(ids < 0) | (ids >= classes)]
        if outside.size:
            raise ValueError(f"{name} must be ids from 0 to {classes - 1}; got {outside[0]}")
    places = labels.astype(np.int64) * classes + predicted
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def per_class_accuracy(
    predicted: Int[np.ndarray, " images"], labels: Int[np.ndarray, " images"], classes: int
) -> Float[np.ndarray, " classes"]:
    """Share of the images of each class that are predicted as it.

    Its mean over the classes is the balanced accuracy.

    Args:
      predicted: `[images]` class ids.
      labels: `[images]` class ids.
      classes: number of classes; all ids are below it.

    Returns:
      `[classes]`, float64; NaN for a class without images.

    Raises:
      ValueError: as `confusion_matrix`.
    """
    matrix = confusion_matrix(predicted, labels, classes)
    images = matrix.sum(axis=1)
    return np.where(images > 0, np.diag(matrix) / np.maximum(images, 1), np.nan)


def most_confused(matrix: Int[np.ndarray, "classes classes"], count: int) -> list[Confused]:
    """The pairs with the largest share of a class's images, at most `count`, largest first.

    Args:
      matrix: of `confusion_matrix`.
      count: pairs wanted; pairs without images are never listed.

    Returns:
      The pairs; equal shares in the order of the classes.
    """
    shares = row_shares(matrix)
    np.fill_diagonal(shares, 0)
    places = np.argsort(-shares, axis=None, kind="stable")[:count]
    pairs = [divmod(int(place), len(matrix)) for place in places]
    return [
        Confused(i, j, int(matrix[i, j]), float(shares[i, j])) for i, j in pairs if shares[i, j]
    ]


def draw_confusion(
    matrix: Int[np.ndarray, "classes classes"], class_names: Sequence[str], path: Path
) -> Path:
    """Draw a confusion matrix; colours are shares of each row.

    Up to 20 classes the cells have their shares in per cent. With more there is a list of the most
    confused pairs beside the matrix, and the colours follow the square root of the shares, so that
    rare confusions can be seen.

    Args:
      matrix: of `confusion_matrix`.
      class_names: one a class.
      path: of the picture.

    Returns:
      `path`.

    Raises:
      ValueError: another number of names than classes.
    """
    if len(class_names) != len(matrix):
        raise ValueError(f"{len(matrix)} classes need as many names; got {len(class_names)}")
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    class_names = [shown(name) for name in class_names]
    numbered = len(matrix) <= NUMBERED
    figure = Figure(figsize=(6.4, 5.6) if numbered else (13, 9.6), layout="constrained")
    columns, ratios = (1, None) if numbered else (2, (3.2, 1))
    axes = figure.subplots(1, columns, width_ratios=ratios, squeeze=False)
    shares, axis = row_shares(matrix), axes[0, 0]
    norm = PowerNorm(1 if numbered else 0.5, vmin=0, vmax=1)
    image = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.6, label="share of the row's images")
    axis.set(xlabel="predicted", ylabel="label")
    axis.set_title(f"{np.trace(matrix) / max(matrix.sum(), 1):.1%} of {matrix.sum():,} images")
    _name_axes(axis, class_names)
    if numbered:
        _number_cells(axis, shares)
    else:
        _list_pairs(axes[0, 1], matrix, class_names)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def row_shares(
    matrix: Int[np.ndarray, "classes classes"],
) -> Float[np.ndarray, "classes classes"]:
    """A confusion matrix with each row divided by its sum; rows without images stay 0."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _name_axes(axis: Any, class_names: Sequence[str]) -> None:
    if len(class_names) > NAMED:
        return
    places, size = range(len(class_names)), 9 if len(class_names) <= NUMBERED else 5
    text = dict(fontsize=size, parse_math=False)
    upright = max(map(len, class_names)) <= 2
    axis.set_xticks(places, class_names, rotation=0 if upright else 90, **text)
    axis.set_yticks(places, class_names, **text)


def _number_cells(axis: Any, shares: np.ndarray) -> None:
    size = 9 if len(shares) <= 10 else 6.5
    for row, column in np.argwhere(shares > 0):
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        axis.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def _list_pairs(axis: Any, matrix: np.ndarray, class_names: Sequence[str]) -> None:
    axis.axis("off")
    axis.set_title("most confused", loc="left")
    for place, pair in enumerate(most_confused(matrix, PAIRS)):
        names = f"{class_names[pair.label]} as {class_names[pair.predicted]}"
        line = f"{pair.share:4.0%}  {names if len(names) <= 36 else names[:35] + '…'}"
        axis.text(0, 1 - (place + 1) / (PAIRS + 1), line, fontsize=9, parse_math=False)
