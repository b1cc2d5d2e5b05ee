"""How well confidence agrees with accuracy: expected calibration error, reliability diagrams."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

Kind = Literal["logits", "probabilities"]
BINS = 15  # as Guo et al., 2017


class Reliability(NamedTuple):
    """Of each bin of confidence; NaN where no example is in it.

    Attributes:
      confidence: mean of the largest probabilities.
      accuracy: share of the examples whose most probable class is their label.
      examples: how many.
    """

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    examples: Int[np.ndarray, " bins"]


def expected_calibration_error(
    outputs: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    *,
    bins: int = BINS,
    kind: Kind = "logits",
) -> float:
    """Distance of accuracy from confidence, mean over the examples, in bins of confidence.

        ECE = sum_b (n_b / n) |accuracy_b - confidence_b|

    Args:
      outputs: `[examples, classes]`, what `kind` says.
      labels: `[examples]` class ids.
      bins: of equal width on 0 to 1; bin b has the confidences in (b / bins, (b + 1) / bins].
      kind: "logits", of which the softmax is taken, or "probabilities".

    Returns:
      0 (calibrated) to 1.

    Raises:
      ValueError: no examples, wrong shapes, labels that are no class, values that are not finite,
        or probabilities that do not sum to 1.

    References:
      Naeini et al., 2015, https://doi.org/10.1609/aaai.v29i1.9602;
      Guo et al., 2017, https://arxiv.org/abs/1706.04599, with 15 bins.
    """
    return of_bins(reliability(outputs, labels, bins=bins, kind=kind))


def of_bins(found: Reliability) -> float:
    """The expected calibration error of a reliability diagram."""
    gaps = np.abs(found.accuracy - found.confidence)
    return float(np.nansum(found.examples * gaps) / found.examples.sum())


def reliability(
    outputs: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    *,
    bins: int = BINS,
    kind: Kind = "logits",
) -> Reliability:
    """Mean confidence, accuracy and number of examples in each bin of confidence.

    Arguments and errors are those of `expected_calibration_error`.
    """
    probabilities = _probabilities(outputs, labels, bins, kind)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    upper = np.arange(1, bins) / bins  # side "left": a confidence on an edge is in the bin below
    places = np.searchsorted(upper, confidence, side="left")
    count = np.bincount(places, minlength=bins)
    total = np.where(count > 0, count, np.nan)
    return Reliability(
        np.bincount(places, confidence, bins) / total,
        np.bincount(places, correct, bins) / total,
        count,
    )


def draw_reliability(
    curves: Mapping[str, Reliability], file: Path, *, errors: Mapping[str, float] | None = None
) -> Path:
    """Write a picture of reliability diagrams, one line each.

    Left: accuracy against confidence, with the diagonal of perfect calibration. Right: the share of
    the examples in each bin.

    Args:
      curves: name, for the legend, to `reliability(...)`, for example one of each severity.
      file: of the picture; its folder is made.
      errors: name to the expected calibration error in the legend, where it is another than the
        curve's own, such as a mean over the curves that were pooled in it.

    Returns:
      The file.
    """
    from matplotlib.figure import Figure

    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot((0, 1), (0, 1), ":", color="grey", lw=1)
    for name, found in curves.items():
        there, bins = found.examples > 0, len(found.examples)
        error = of_bins(found) if errors is None else errors[name]
        label = f"{name} (ECE {error:.3f}, {bins} bins)"
        axes[0].plot(found.confidence[there], found.accuracy[there], marker=".", label=label)
        share = found.examples / found.examples.sum()
        axes[1].stairs(share, np.arange(bins + 1) / bins, lw=1.5)
    axes[0].set(title="reliability", xlabel="confidence", ylabel="accuracy", ylim=(0, 1))
    axes[1].set(title="confidences", xlabel="confidence", ylabel="share of the images")
    for axis in axes:
        axis.set_xlim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
    return file


def _probabilities(outputs: np.ndarray, labels: np.ndarray, bins: int, kind: str) -> np.ndarray:
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1] or not len(labels) or bins < 1:
        raise ValueError(
            f"expected [examples, classes] outputs, as many labels and at least 1 bin; got outputs "
            f"{list(outputs.shape)}, labels {list(labels.shape)}, bins {bins}"
        )
    classes = outputs.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels are {labels.min()} to {labels.max()}, expected 0 to {classes - 1}: there are "
            f"outputs for {classes} classes"
        )
    values = outputs.astype(np.float64)
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise ValueError(f"the outputs of {bad} of {len(values)} examples are not finite")
    if kind == "logits":
        weights = np.exp(values - values.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)
    if kind != "probabilities":
        raise ValueError(f"kind is {kind!r}, expected 'logits' or 'probabilities'")
    if (values < 0).any() or (np.abs(values.sum(axis=1) - 1) > 1e-3).any():
        raise ValueError(
            "probabilities are to be from 0 on and to sum to 1 for each example; for others pass "
            "kind='logits'"
        )
    return values
