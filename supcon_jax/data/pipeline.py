"""Batches: batch k of a stage is a pure function of (seed, stage, k): nothing has to be saved."""

import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from supcon_jax.data.sources import Source

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")


def training_batch(
    source: Source,
    k: int,
    *,
    seed: int,
    stage: str,
    batch_size: int,
    samples_per_class: int = 0,
    mix_alpha: float = 0.0,
    places: np.ndarray | None = None,
) -> Batch:
    """Batch k of a stage, or a part of it.

    Args:
      source: training images.
      k: number of the batch, from 0.
      seed: of the run.
      stage: name of the stage.
      batch_size: images in the whole batch.
      samples_per_class: images of each class in the batch, see `batch_indices`; 0: no such rule.
      mix_alpha: of the shares of mixed images, see `mixing`; 0: none are mixed.
      places: `[b]`, the rows of the batch that are made; by default all.

    Returns:
      "image" `[b, 1, H, W, C]` uint8, "label" `[b]` int32, "position" `[b]` int32, of the images
      that `batch_indices` gives. If `mix_alpha` is positive, each with its partner: "image"
      `[b, 2, H, W, C]`, "label" `[b, 2]`, and "share" `[b]` float32 of the first image.
    """
    places = np.arange(batch_size, dtype=np.int32) if places is None else places
    run: dict[str, Any] = {"seed": seed, "stage": stage}
    stored = stored_indices(
        k,
        size=source.size,
        mix_alpha=mix_alpha,
        batch_size=batch_size,
        samples_per_class=samples_per_class,
        by_class=images_by_class(source) if samples_per_class else (),
        **run,
    )[places]
    images, labels = source.load(stored.ravel())
    batch = {
        "image": images.reshape(len(places), -1, *images.shape[1:]),
        "label": labels.reshape(stored.shape),
        "position": places,
    }
    if mix_alpha:
        batch["share"] = mixing(batch_size, k, alpha=mix_alpha, **run)[1][places]
    return batch


def batch_indices(
    size: int,
    k: int,
    *,
    seed: int,
    stage: str,
    batch_size: int,
    samples_per_class: int = 0,
    by_class: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Which images are in batch k of a stage.

    Batches never cross an epoch: each takes floor(size / batch_size) batches from a new order of
    all images, and what remains at its end is left out of that epoch.

    With m = `samples_per_class` a batch has batch_size / m different classes with m images each.
    Classes follow the same rule as images above: each round takes as many batches as it can from a
    new order of all classes. In round r a class gives its r-th group of m images, where its groups
    are cut from one order of its images after the other. The classes alternate in the batch, so
    that each device gets some of each.

    Args:
      size: number of images.
      k: number of the batch, from 0.
      seed: of the run.
      stage: name of the stage.
      batch_size: images in the batch.
      samples_per_class: images of each class, 0 for no such rule.
      by_class: `images_by_class` of the source, where `samples_per_class` is positive.

    Returns:
      `[batch_size]` integers from 0 to `size - 1`.

    Raises:
      ValueError: `batch_size` is no multiple of `samples_per_class`, or needs too many classes.
    """
    if not samples_per_class:
        epoch, place = divmod(k, size // batch_size)
        order = epoch_order(size, seed=seed, stage=stage, epoch=epoch)
        return order[place * batch_size : (place + 1) * batch_size]
    _check_groups(len(by_class), batch_size, samples_per_class)
    turn, classes = _classes(len(by_class), k, batch_size // samples_per_class, seed, stage)
    groups = []
    for c in classes:
        order, group = _group(len(by_class[c]), turn, samples_per_class, seed, f"{stage}/class {c}")
        members = slice(group * samples_per_class, (group + 1) * samples_per_class)
        groups.append(by_class[c][order[members]])
    return np.stack(groups, axis=1).reshape(batch_size)


def stand_ins(
    place: int,
    k: int,
    *,
    size: int,
    seed: int,
    stage: str,
    batch_size: int,
    samples_per_class: int = 0,
    by_class: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Which images can stand in for one of batch k that cannot be decoded; the first is the best.

    They follow the batch in the epoch's order, whose end is followed by its start. First come those
    at the same place of later batches, so that no two places of a batch get the same image, then
    the rest, and last the batch itself, where there is nothing else. With `samples_per_class` the
    order is that of the images of the class, which so keeps its number.

    Args:
      place: of the image in the batch.
      k: number of the batch.
      size: number of images.
      seed: this and the others are as in `batch_indices`.
      stage: name of the stage.
      batch_size: images in the batch.
      samples_per_class: images of each class, 0 for no such rule.
      by_class: `images_by_class` of the source, where `samples_per_class` is positive.

    Returns:
      `[n]` integers from 0 to `size - 1`.
    """
    if not samples_per_class:
        epoch, group = divmod(k, size // batch_size)
        order = epoch_order(size, seed=seed, stage=stage, epoch=epoch)
        return _after(order, group, batch_size, place)
    count = batch_size // samples_per_class
    turn, classes = _classes(len(by_class), k, count, seed, stage)
    member, c = place // count, classes[place % count]
    order, group = _group(len(by_class[c]), turn, samples_per_class, seed, f"{stage}/class {c}")
    return by_class[c][_after(order, group, samples_per_class, member)]


def _after(order: np.ndarray, group: int, length: int, member: int) -> np.ndarray:
    """What can take the place of a member of the group of this number in an order."""
    ring = np.roll(order, -(group + 1) * length)
    rest, own = np.split(ring, [len(ring) - length])
    return np.concatenate([rest[member::length], np.roll(rest, -member), own])


def _classes(classes: int, k: int, count: int, seed: int, stage: str) -> tuple[int, np.ndarray]:
    """The round that batch k belongs to, and its classes `[count]`."""
    turn, place = divmod(k, classes // count)
    order = _small_order(classes, seed=seed, stage=f"{stage}/classes", epoch=turn)
    return turn, order[place * count : (place + 1) * count]


def stored_indices(k: int, *, size: int, mix_alpha: float = 0.0, **options: Any) -> np.ndarray:
    """The images of batch k as they are stored: `[b]`, or with mixing `[b, 2]`.

    Args:
      k: number of the batch.
      size: number of images.
      mix_alpha: see `training_batch`.
      options: those of `batch_indices`.
    """
    chosen = batch_indices(size, k, **options)
    if not mix_alpha:
        return chosen
    of_stage = {"seed": options["seed"], "stage": options["stage"]}
    partner, _ = mixing(len(chosen), k, **of_stage, alpha=mix_alpha)
    return np.stack([chosen, chosen[partner]], axis=1)


def _group(size: int, number: int, length: int, seed: int, stage: str) -> tuple[np.ndarray, int]:
    """An order of `size` things, repeated where `length` are more, and which of its groups of
    `length` is the one of this number.
    """
    epoch, group = divmod(number, max(1, size // length))
    order = _small_order(size, seed=seed, stage=stage, epoch=epoch)
    return np.resize(order, max(size, length)), group


@lru_cache(maxsize=4)  # a million images take tens of milliseconds and 10 MB
def epoch_order(size: int, *, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A permutation of all images for each (seed, stage, epoch), not to be written to."""
    order = _random(seed, stage, epoch).permutation(size)
    order.setflags(write=False)
    return order


_small_order = lru_cache(maxsize=1024)(epoch_order.__wrapped__)  # of classes, or of one's images


def _random(seed: int, stage: str, number: int) -> np.random.RandomState:
    """`RandomState` because NumPy promises that its stream never changes between versions."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), number])
    return np.random.RandomState(np.random.MT19937(entropy))


_BY_CLASS: WeakKeyDictionary[Source, list[np.ndarray]] = WeakKeyDictionary()


def images_by_class(source: Source) -> list[np.ndarray]:
    """The numbers of the images of each class that has any; found once for each source."""
    if source not in _BY_CLASS:
        labels = source.labels()
        order = np.argsort(labels, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(labels))[:-1])
        _BY_CLASS[source] = [part for part in parts if len(part)]
    return _BY_CLASS[source]


def check_balance(source: Source, *, batch_size: int, samples_per_class: int) -> str:
    """Check that batches can have so many images of each class.

    Returns:
      A warning that names the classes with fewer images, which repeat them in a batch; or "".

    Raises:
      ValueError: `batch_size` is no multiple of `samples_per_class`, or needs too many classes.
    """
    by_class = images_by_class(source)
    _check_groups(len(by_class), batch_size, samples_per_class)
    labels = source.labels()
    small = [source.class_names[labels[i[0]]] for i in by_class if len(i) < samples_per_class]
    if not small:
        return ""
    return (
        f"{source.name}: {len(small)} of {len(by_class)} classes have fewer than samples_per_class="
        f"{samples_per_class} images, which repeat in a batch: {', '.join(small[:5])}"
        f"{', ...' * (len(small) > 5)}"
    )


def _check_groups(classes: int, batch_size: int, samples_per_class: int) -> None:
    if samples_per_class < 1:
        raise ValueError(f"samples_per_class must be 0 (off) or more; got {samples_per_class}")
    below, rest = divmod(batch_size, samples_per_class)
    if rest:
        valid = [below * samples_per_class, (below + 1) * samples_per_class]
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of samples_per_class={samples_per_class}, "
            f"such as {' or '.join(str(v) for v in valid if v)}"
        )
    if below > classes:
        fits = (m for m in range(1, batch_size + 1) if batch_size % m == 0)
        nearest = next(m for m in fits if batch_size // m <= classes)
        raise ValueError(
            f"samples_per_class={samples_per_class} makes {below} classes in a batch of "
            f"{batch_size}, but there are {classes}; the smallest that fits is {nearest}"
        )


def mixing(
    batch_size: int, k: int, *, seed: int, stage: str, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which images of batch k are mixed, and in what shares, for mixup and CutMix.

    Args:
      batch_size: images in the batch.
      k: number of the batch.
      seed: of the run.
      stage: name of the stage.
      alpha: of the Beta(alpha, alpha) distribution of the shares: 1 is uniform, small values seldom
        mix much.

    Returns:
      The places of the partners, a random permutation `[batch_size]`, and the shares of the first
      image, `[batch_size]` float32.

    References:
      Zhang et al., mixup, 2018, https://arxiv.org/abs/1710.09412.
      Yun et al., CutMix, 2019, https://arxiv.org/abs/1905.04899.
    """
    random = _random(seed, f"{stage}/mix", k)
    partner = random.permutation(batch_size)
    return partner, random.beta(alpha, alpha, batch_size).astype(np.float32)


def evaluation_batches(
    source: Source, batch_size: int, places: np.ndarray | None = None
) -> Iterator[tuple[Batch, int]]:
    """Every image once, in order; the last batch is filled up with zeros.

    Args:
      source: the images.
      batch_size: of a whole batch.
      places: `[b]` ascending, the rows of each batch that are made; by default all.

    Yields:
      "image" `[b, 1, H, W, C]` and "label" `[b]`, and how many rows of the whole batch are real.
    """
    places = np.arange(batch_size) if places is None else places
    for start in range(0, source.size, batch_size):
        count = min(batch_size, source.size - start)
        images, labels = source.load(start + places[places < count])
        missing = len(places) - len(labels)
        image = np.pad(images, [(0, missing)] + [(0, 0)] * 3)[:, None]
        yield {"image": image, "label": np.pad(labels, (0, missing))}, count


def prefetch(items: Iterator[Item], depth: int = 2) -> Generator[Item]:
    """The same items in the same order, up to `depth` of them made ahead in another thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item
