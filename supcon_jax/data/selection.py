"""Parts of a training set: fewer images, rarer classes, wrong labels; each a new source.

All draws are fixed (`seed`, which is not the run's), so that runs with different seeds see the same
images and labels.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from supcon_jax.data.sources import Encoded, Loaded, Source, subset


def select(
    source: Source,
    *,
    fraction: float = 1.0,
    per_class: int = 0,
    imbalance: float = 1.0,
    label_noise: float = 0.0,
) -> Source:
    """`long_tail`, then `fraction_of`, then `images_per_class`, then `with_label_noise`.

    Images are chosen by their true labels; the noise is drawn for those that are left.

    Args:
      source: training images.
      fraction: share of each class that is kept; 1: all.
      per_class: images of each class that are kept; 0: all.
      imbalance: images of the first class over images of the last; 1: as they are.
      label_noise: probability that a label is drawn anew; 0: never.

    Returns:
      A source with what is left; `source` itself if all are off.

    Raises:
      ValueError: a value out of range, or a class with fewer than `per_class` images.
    """
    if imbalance != 1:
        source = long_tail(source, imbalance)
    if fraction != 1:
        source = fraction_of(source, fraction)
    if per_class != 0:
        source = images_per_class(source, per_class)
    if label_noise != 0:
        source = with_label_noise(source, label_noise)
    return source


def fraction_of(source: Source, fraction: float, seed: int = 0) -> Source:
    """A share of each class, at least one image; smaller shares are inside larger ones."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1; got {fraction}")
    labels, counts = _labels_and_counts(source)
    keep = np.maximum(1, np.round(fraction * counts)).astype(int)
    return _first_of_each_class(source, labels, keep, seed, f"{100 * fraction:g} %")


def images_per_class(source: Source, count: int, seed: int = 0) -> Source:
    """So many images of each class; smaller choices are inside larger ones."""
    if count < 1:
        raise ValueError(f"per_class must be at least 1; got {count}")
    labels, counts = _labels_and_counts(source)
    if (counts < count).any():
        scarce = int(counts.argmin())
        raise ValueError(
            f"per_class={count} is more than the {counts[scarce]} images of class "
            f"{source.class_names[scarce]!r} in {source.name}, the fewest of all classes"
        )
    keep = np.full_like(counts, count)
    return _first_of_each_class(source, labels, keep, seed, f"{count} a class")


def long_tail(source: Source, imbalance: float, seed: int = 0) -> Source:
    """Ever fewer images from the first class to the last: n_c = floor(n_0 imbalance^(-c / (C-1))).

    n_0 is what the first class has. At least one image of each class is kept, and all of a class
    that has fewer than its number; the published sets start from equally large classes.

    Args:
      source: training images with C classes.
      imbalance: n_0 over the number of the last class, at least 1.
      seed: of the choice within a class.

    Returns:
      The images left, in the order of the source.

    Raises:
      ValueError: `imbalance` is below 1.

    References:
      Cui et al., 2019, https://arxiv.org/abs/1901.05555, section 5.1.
      Cao et al., 2019, https://arxiv.org/abs/1906.07413; its `imb_factor` is 1 / imbalance.
    """
    if not 1 <= imbalance < np.inf:
        raise ValueError(
            f"imbalance must be at least 1, images of the first class over those of the last; "
            f"got {imbalance}"
        )
    labels, counts = _labels_and_counts(source)
    places = np.arange(len(counts)) / max(1, len(counts) - 1)
    first = counts[counts > 0][0]
    wanted = np.floor(first * float(imbalance) ** -places + 1e-6)  # 1e-6: errors of rounding
    keep = np.maximum(1, wanted).astype(int)
    return _first_of_each_class(source, labels, keep, seed, f"long tail {imbalance:g}")


def with_label_noise(source: Source, probability: float, seed: int = 0) -> Source:
    """Some labels replaced by a uniformly random class, once and for all.

    The random class may be the true one, as in the authors' TensorFlow code, so that a share of
    probability (C - 1) / C of the labels is wrong. Labels replaced at a smaller probability are
    replaced by the same classes at a larger one.

    Args:
      source: training images with C classes.
      probability: of each label to be replaced.
      seed: of the draw.

    Returns:
      The same images with the new labels.

    Raises:
      ValueError: `probability` is not from 0 to 1.

    References:
      https://github.com/google-research/google-research/tree/master/supcon, `label_noise_prob`.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"label_noise must be a probability from 0 to 1; got {probability}")
    random = np.random.RandomState(seed)
    replaced = random.random_sample(source.size) < probability
    drawn = random.randint(len(source.class_names), size=source.size, dtype=np.int32)
    read = source.read

    def load(indices: np.ndarray) -> Loaded:
        images, labels = source.load(indices)
        return images, np.where(replaced[indices], drawn[indices], labels)

    def read_noisy(indices: np.ndarray) -> list[Encoded]:
        assert read is not None
        rows = zip(indices, read(indices), strict=True)
        return [row._replace(label=int(drawn[i])) if replaced[i] else row for i, row in rows]

    return replace(
        source,
        name=f"{source.name} ({100 * probability:g} % label noise)",
        load=load,
        labels=lambda: np.where(replaced, drawn, source.labels()),
        read=None if read is None else read_noisy,
    )


def stratified_share(
    labels: Int[np.ndarray, " images"], share: float, seed: int = 0
) -> Bool[np.ndarray, " images"]:
    """Which images are held out: evenly spaced ones, with the images in random order by class.

    Args:
      labels: `[images]` class ids.
      share: of the images.
      seed: of the order.

    Raises:
      ValueError: no image would be held out, or none left.
    """
    count, images = round(share * len(labels)), len(labels)
    if not 0 < count < images:
        raise ValueError(f"a share must leave images on both sides; got {share} of {images}")
    order = np.random.RandomState(seed).permutation(images)
    by_class = order[np.argsort(labels[order], kind="stable")]
    held = np.zeros(images, bool)
    held[by_class[((np.arange(count) + 0.5) * images / count).astype(int)]] = True
    return held


def _labels_and_counts(source: Source) -> tuple[np.ndarray, np.ndarray]:
    labels = source.labels()
    return labels, np.bincount(labels, minlength=len(source.class_names))


def _first_of_each_class(
    source: Source, labels: np.ndarray, keep: np.ndarray, seed: int, what: str
) -> Source:
    """The first `keep[c]` images of class c in a fixed random order, in the source's order."""
    order = np.random.RandomState(seed).permutation(source.size)
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=len(keep))
    rank = np.arange(source.size) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.sort(by_class[rank < keep[labels[by_class]]])
    left = labels[chosen]  # known from here on: the source may read every record for its labels
    part = subset(source, chosen, f"{source.name} ({what})")
    return replace(part, labels=lambda: left)
