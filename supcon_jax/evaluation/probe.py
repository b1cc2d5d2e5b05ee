"""Linear probe: multinomial logistic regression on features that are computed once."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from supcon_jax.data.selection import stratified_share

PENALTIES = tuple(10.0**power for power in range(-7, 2))
CONVERGED = 1e-3  # largest entry of a gradient that is left without a warning


class Probe(NamedTuple):
    """A linear classifier: logits = features @ kernel + bias."""

    kernel: Float[np.ndarray, "dim classes"]
    bias: Float[np.ndarray, " classes"]


class Sweep(NamedTuple):
    """A probe with the penalty that held-out features chose."""

    probe: Probe  # of all training features
    l2: float
    accuracies: dict[float, float]  # held-out, of every penalty, or what else `score` gave

    @property
    def on_edge(self) -> bool:
        """Whether the penalty is the smallest or largest one tried: a better one may lie beyond."""
        return self.l2 in (min(self.accuracies), max(self.accuracies))


class _Spectrum(NamedTuple):
    """The mean of the features, and the variances along the axes that do not correlate."""

    mean: np.ndarray
    variances: np.ndarray
    axes: np.ndarray


def fit_probe(
    features: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    *,
    classes: int,
    l2: float,
    start: Probe | None = None,
    tolerance: float = 2e-6,
    steps: int = 1000,
) -> Probe:
    """Minimise the mean cross-entropy with an L2 penalty on the kernel, by L-BFGS on all images.

        (1 / n) sum_i -log softmax(x_i W + b)_{y_i}  +  (l2 / 2) |W|^2

    The bias b is not penalised. It is scikit-learn's `LogisticRegression(C=1 / (l2 * n))`; with two
    classes, for which scikit-learn fits one vector of weights in place of two, `C=2 / (l2 * n)`.

    The features are used as they are, and l2 is relative to their scale: a times the features need
    a^2 times the l2. The search runs in coordinates in which the features are uncorrelated, and so
    takes few steps for correlated features too.

    Args:
      features: `[images, dim]`, finite.
      labels: `[images]` class ids in [0, classes).
      classes: number of classes.
      l2: weight of the penalty, above 0.
      start: where to start; zero otherwise. The minimum does not depend on it.
      tolerance: largest entry of the gradient, in the search's coordinates, at which it ends; it
        also ends where float32 sees no way down.
      steps: most steps of L-BFGS; a warning tells if they were not enough.

    Returns:
      The probe, float32.

    Raises:
      ValueError: sizes that do not match, an id out of range, features that are not finite, or a
        penalty that is not above 0.

    References:
      Liu and Nocedal, On the Limited Memory BFGS Method for Large Scale Optimization, 1989.
    """
    _check(features, labels, classes, (l2,))
    return _fit(features, labels, _spectrum(features), l2, start, classes, tolerance, steps)


def sweep_probe(
    features: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    holdout: float = 0.1,
    seed: int = 0,
    held: Bool[np.ndarray, " images"] | None = None,
    score: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> Sweep:
    """`fit_probe` with the penalty that is best on a held-out share of the training features.

    The share is stratified: each class gives its part, to one image. From the strongest penalty to
    the weakest, each search starts where the one before ended. Of equally accurate penalties that
    with the smaller held-out cross-entropy is chosen, because a strong penalty can leave the right
    class first but all of them alike. The probe is then fitted to all features.

    Args:
      features: `[images, dim]` of training images.
      labels: `[images]` class ids in [0, classes).
      classes: number of classes.
      penalties: values of l2, each above 0.
      holdout: share of the images that is held out.
      seed: of the choice of these.
      held: `[images]`, which are held out, where that is not to be drawn.
      score: `(predicted ids, ids) -> what is best when largest`; by default the accuracy.

    Returns:
      The probe, the chosen l2, and the held-out accuracy of each penalty.

    Raises:
      ValueError: as `fit_probe`; or no penalties, or nothing left to train on or to hold out.

    References:
      Kornblith et al., Do Better ImageNet Models Transfer Better?, 2019,
      https://arxiv.org/abs/1805.08974 (the penalty chosen on held-out images, then all of them).
    """
    _check(features, labels, classes, penalties)
    held = stratified_share(labels, holdout, seed) if held is None else held
    score = score or (lambda predicted, ids: float((predicted == ids).mean()))
    spectrum, probes, scores = _spectrum(features), {}, {}
    kept, of_kept, probe = features[~held], labels[~held], None
    for l2 in sorted(penalties, reverse=True):
        probe = probes[l2] = _fit(kept, of_kept, spectrum, l2, probe, classes)
        logits, ids = predict_logits(probe, features[held]), labels[held]
        scores[l2] = (score(logits.argmax(axis=-1), ids), -_cross_entropy(logits, ids))
    best = max(scores, key=lambda l2: (scores[l2], l2))
    final = _fit(features, labels, spectrum, best, probes[best], classes)
    return Sweep(final, best, {l2: accuracy for l2, (accuracy, _) in scores.items()})


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.special import log_softmax  # type: ignore[import-untyped]

    return float(-log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].mean())


def predict_logits(
    probe: Probe, features: Float[np.ndarray, "images dim"]
) -> Float[np.ndarray, "images classes"]:
    """features @ kernel + bias: one row of logits an image."""
    return features @ probe.kernel + probe.bias


def _fit(
    features: np.ndarray,
    labels: np.ndarray,
    spectrum: _Spectrum,
    l2: float,
    start: Probe | None,
    classes: int,
    tolerance: float = 2e-6,
    steps: int = 1000,
) -> Probe:
    """L-BFGS in the coordinates (V, c) with W = basis V, b = sqrt(classes) c - mean W.

    There the matrix of second derivatives is near the identity while the predictions are uncertain.
    Sums over images and the search itself are float64, products float32.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits

    rows, ids = jnp.asarray(features), jnp.asarray(labels)
    scales = np.sqrt(spectrum.variances / classes + l2)
    basis = spectrum.axes / scales[None]
    shift, stretch = spectrum.mean, classes**0.5

    def probe_of(x: np.ndarray) -> Probe:
        *rotated, centred = x.reshape(-1, classes)
        kernel = basis @ np.stack(rotated)
        return Probe(kernel, stretch * centred - shift @ kernel)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = probe_of(x)
        losses, slopes = _losses(rows, ids, np.float32(kernel.T), np.float32(bias))
        of_kernel, of_bias = (np.asarray(slope, np.float64) for slope in slopes)
        of_kernel = of_kernel.T + l2 * kernel - np.outer(shift, of_bias)
        gradient = np.concatenate([basis.T @ of_kernel, stretch * of_bias[None]])
        value = np.asarray(losses).mean(dtype=np.float64) + l2 / 2 * np.square(kernel).sum()
        return float(value), gradient.ravel()

    x = np.zeros((len(basis) + 1, classes))
    if start is not None:
        x[:-1] = (spectrum.axes * scales[None]).T @ start.kernel
        x[-1] = (start.bias + shift @ start.kernel) / stretch
    limits = dict(maxiter=steps, maxfun=2 * steps, gtol=tolerance, ftol=1e-10, maxcor=20)
    limits["maxls"] = 5  # at float32's precision no step is downhill enough: do not go on trying
    with threadpool_limits(1):  # as in `_spectrum`; those of XLA are not limited
        found = minimize(objective, x.ravel(), jac=True, method="L-BFGS-B", options=limits)
    slope = abs(found.jac).max()
    if slope > max(tolerance, CONVERGED):
        warnings.warn(
            f"the probe with l2 = {l2:g} has not converged in {found.nit} steps of L-BFGS (its "
            f"gradient is still {slope:.1e}): allow more steps, or use a stronger penalty",
            RuntimeWarning,
            stacklevel=3,
        )
    kernel, bias = probe_of(found.x)
    return Probe(kernel.astype(np.float32), bias.astype(np.float32))


@jax.jit
def _losses(
    features: Array, labels: Array, columns: Array, bias: Array
) -> tuple[Array, tuple[Array, Array]]:
    """The cross-entropy of each image, and the gradient of their mean.

    The kernel comes as its columns, `[classes, dim]`: a CPU takes a third of the time for the
    product that is their gradient.
    """

    def mean_and_all(columns: Array, bias: Array) -> tuple[Array, Array]:
        logits = jnp.matmul(features, columns.T, precision="highest") + bias[None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), losses

    slopes, losses = jax.grad(mean_and_all, argnums=(0, 1), has_aux=True)(columns, bias)
    return losses, slopes


def _spectrum(features: np.ndarray) -> _Spectrum:
    from threadpoolctl import threadpool_limits

    mean = features.mean(axis=0, dtype=np.float64)
    products = np.asarray(_products(features), np.float64) / len(features)
    with threadpool_limits(1):  # its threads wait by spinning, for seconds on a busy machine
        variances, axes = np.linalg.eigh(products - np.outer(mean, mean))
    return _Spectrum(mean, np.maximum(variances, 0), axes)


@jax.jit
def _products(features: Array) -> Array:
    return jnp.matmul(features.T, features, precision="highest")


def _check(
    features: np.ndarray, labels: np.ndarray, classes: int, penalties: Sequence[float]
) -> None:
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(
            "a probe needs at least one image and one label an image; got "
            f"{len(features)} rows of features and {len(labels)} labels"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be ids from 0 to {classes - 1}; got {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            "features must be finite; got some that are not: the encoder's training diverged"
        )
    if len(penalties) == 0 or min(penalties) <= 0:
        raise ValueError(f"penalties must be above 0, at least one; got {list(penalties)}")
