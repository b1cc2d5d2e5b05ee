"""Batches: batch k of a stage is a pure function of (seed, stage, k): nothing has to be saved."""

import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from supcon_jax.data.sources import Source

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")


def training_batch(source: Source, k: int, *, seed: int, stage: str, batch_size: int) -> Batch:
    """Batch k of a stage.

    Batches never cross an epoch: each takes floor(size / batch_size) batches from a new order of
    all images, and what remains at its end is left out of that epoch.

    Args:
      source: training images.
      k: number of the batch, from 0.
      seed: of the run.
      stage: name of the stage.
      batch_size: images in the batch.

    Returns:
      "image" `[b, 1, H, W, C]` uint8, "label" `[b]` int32, "position" `[b]` int32.
    """
    epoch, place = divmod(k, source.size // batch_size)
    order = epoch_order(source.size, seed=seed, stage=stage, epoch=epoch)
    images, labels = source.load(order[place * batch_size : (place + 1) * batch_size])
    return {
        "image": images[:, None],
        "label": labels,
        "position": np.arange(batch_size, dtype=np.int32),
    }


def epoch_order(size: int, *, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A permutation of all images for each (seed, stage, epoch).

    `RandomState` because NumPy promises that its stream never changes between versions.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), epoch])
    return np.random.RandomState(np.random.MT19937(entropy)).permutation(size)


def evaluation_batches(source: Source, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Every image once, in order; the last batch is filled up with zeros.

    Yields:
      "image" `[batch_size, 1, H, W, C]` and "label" `[batch_size]`, and how many of them are real.
    """
    for start in range(0, source.size, batch_size):
        images, labels = source.load(np.arange(start, min(start + batch_size, source.size)))
        missing = batch_size - len(labels)
        image = np.pad(images, [(0, missing)] + [(0, 0)] * 3)[:, None]
        yield {"image": image, "label": np.pad(labels, (0, missing))}, len(labels)


def prefetch(items: Iterator[Item], depth: int = 2) -> Generator[Item]:
    """The same items in the same order, up to `depth` of them made ahead in another thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item
