"""Batches of a split that does not fit in memory, decoded and cropped on the host as they are used.

Batch k is a pure function of (seed, stage, k), as it is in memory: neither the number of workers or
processes nor where the stream started changes it, so nothing has to be saved to resume.
"""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from itertools import islice, product
from multiprocessing import util
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from supcon_jax.data.decode import DecodeError, opencv, random_crops, usable_cores
from supcon_jax.data.pipeline import Batch, images_by_class, mixing, stand_ins, stored_indices
from supcon_jax.data.sources import Encoded, Source, refuse_many

CHUNK = 32  # images handed over at once: many, for little work, and few, for an early start
AHEAD = 3  # chunks of each worker that are being made or wait to be taken
BAD_OF = 1000  # images are seen before `sources.BAD_SHARE` counts, so that the first stops nothing
TRIED = 100  # images in the place of one that cannot be decoded
CROPS = zlib.crc32(b"crops")  # keeps these random numbers apart from others of (seed, stage, k)
FREE, FULL, STOP = range(3)
SHARED = Path("/dev/shm")  # where Linux keeps shared memory

Read = Callable[[np.ndarray], list[Encoded]]
Filled = tuple[np.ndarray, list[str]]  # labels of a chunk; a line for each image that is bad
Fill = Callable[[int, np.ndarray], Filled]


class Chunk(NamedTuple):
    """A part of a batch: images `[n, stored * views, size, size, channels]`, labels `[n, stored]`,
    and a line for each image that could not be decoded on the way.
    """

    images: np.ndarray
    labels: np.ndarray
    bad: list[str]


def stream(
    source: Source,
    *,
    start: int,
    stop: int,
    seed: int,
    stage: str,
    batch_size: int,
    views: int,
    size: int,
    channels: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    workers: int,
    on_error: Literal["error", "skip"] = "error",
    samples_per_class: int = 0,
    mix_alpha: float = 0.0,
    places: np.ndarray | None = None,
    warn: Callable[[str], None] | None = None,
) -> Generator[Batch]:
    """Batches `start` to `stop - 1` of a stage, with random crops made while decoding.

    The crops are those of `augment.random_resized_crop`; an image is decoded once for all its
    views. The images are those of `pipeline.training_batch`; one that cannot be decoded gives its
    place to the first of `pipeline.stand_ins` that can.
    Close the generator when done: that ends the worker processes.

    Args:
      source: training images; one with `read`.
      start: number of the first batch.
      stop: number after that of the last batch.
      seed: of the run.
      stage: name of the stage.
      batch_size: images in the global batch.
      views: crops of each image.
      size: their side in pixels.
      channels: 1 (grey) or 3 (RGB).
      area: smallest and largest share of the image's area in a crop.
      ratio: smallest and largest width / height of a crop.
      workers: processes that decode, by Grain; 0: threads of this process.
      on_error: what an image that cannot be decoded does: "error", or "skip": another one takes its
        place, with one warning.
      samples_per_class: see `pipeline.batch_indices`.
      mix_alpha: see `pipeline.training_batch`.
      places: `[b]` ascending, the rows of each global batch that this process makes; by default
        all.
      warn: gets a line about each undecodable image; by default it goes to standard error.

    Yields:
      "image" `[b, stored * views, size, size, channels]` uint8, where the views of a stored image
      are neighbours; "label" int32, `[b]`, or `[b, 2]` of mixed images; "position" `[b]` int32, the
      place in the global batch; of mixed images "share" `[b]` float32.

    Raises:
      ValueError: a source in memory, or an image that cannot be decoded; with "skip", more than 1 %
        of them.
      ModuleNotFoundError: `workers` without Grain.
    """
    if source.read is None:
        raise ValueError(f"{source.name} is decoded in memory: there is nothing to stream")
    order: dict[str, Any] = {
        "size": source.size,
        "seed": seed,
        "stage": stage,
        "batch_size": batch_size,
        "samples_per_class": samples_per_class,
        "by_class": images_by_class(source) if samples_per_class else (),
    }
    places = np.arange(batch_size, dtype=np.int32) if places is None else places
    parts = np.array_split(places, -(-len(places) // CHUNK))
    stored = (2,) if mix_alpha else ()
    fill = partial(
        fill_chunk,
        parts=parts,
        read=source.read,
        indices_of=partial(stored_indices, mix_alpha=mix_alpha, **order),
        stand_ins_of=partial(stand_ins, **order),
        draws_of=partial(crop_draws, (batch_size, math.prod(stored), views), seed, stage),
        crop=partial(random_crops, size=size, channels=channels, area=area, ratio=ratio),
    )
    shape = (math.prod(stored) * views, size, size, channels)
    numbers = range(start * len(parts), stop * len(parts))
    known: dict[str, None] = {}  # in order
    with closing(_chunks(fill, numbers, (len(parts[0]), *shape), workers)) as chunks:
        for k in range(start, stop):
            batch = {
                "image": np.empty((len(places), *shape), np.uint8),
                "label": np.empty((len(places), *stored), np.int32),
                "position": places.copy(),
            }
            bad, row = [], 0
            for part in parts:
                bad += _take(next(chunks), batch, row, len(part))
                row += len(part)
            seen = (k + 1 - start) * batch["label"].size
            if bad and on_error == "error":
                raise ValueError(f"{bad[0]}, or skip such images: --config.data.on_error=skip")
            _report(bad, known, min(source.size, max(seen, BAD_OF)), warn or _print)
            if mix_alpha:
                shares = mixing(batch_size, k, seed=seed, stage=stage, alpha=mix_alpha)[1]
                batch["share"] = shares[places]
            yield batch


def fill_chunk(
    number: int,
    out: np.ndarray,
    *,
    parts: list[np.ndarray],
    read: Read,
    indices_of: Callable[[int], np.ndarray],
    stand_ins_of: Callable[[int, int], np.ndarray],
    draws_of: Callable[[int], np.ndarray],
    crop: Callable[..., list[np.ndarray]],
) -> Filled:
    """Read and crop the images of a chunk.

    Args:
      number: of the chunk: batch `number // len(parts)`, part `number % len(parts)`.
      out: `[n, stored * views, size, size, channels]` uint8, gets the crops.
      parts: the places in the global batch that its chunks have.
      read: of the source.
      indices_of: `k -> [batch_size]` or `[batch_size, stored]`, the images of batch k.
      stand_ins_of: `(place, k) -> [n]`, the images that can take a place of batch k.
      draws_of: `k -> [batch_size, stored, views, 4]`, the random numbers of their crops.
      crop: `decode.random_crops` with all options.

    Returns:
      Labels `[n * stored]` int32, and a line for each image that cannot be decoded.
    """
    k, part = divmod(number, len(parts))
    places, draws = parts[part], draws_of(k)
    rows = read(indices_of(k)[places].ravel())
    slots = out[: len(places)].reshape(len(rows), -1, *out.shape[2:])  # [n * stored, views, ...]
    labels = np.empty(len(rows), np.int32)
    bad: list[str] = []
    for i, (place, column) in enumerate(product(places.tolist(), range(draws.shape[1]))):
        candidates = _candidates(rows[i], partial(stand_ins_of, place, k), read)
        labels[i] = _first_good(candidates, draws[place, column], crop, slots[i], bad)
    return labels, bad


def crop_draws(shape: tuple[int, int, int], seed: int, stage: str, k: int) -> np.ndarray:
    """`[*shape, 4]` uniform in [0, 1): the random numbers of all crops of global batch k."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), k, CROPS])
    return np.random.RandomState(np.random.MT19937(entropy)).random_sample((*shape, 4))


def _candidates(row: Encoded, others: Callable[[], np.ndarray], read: Read) -> Iterator[Encoded]:
    """An image, and those that can take its place."""
    yield row
    for index in others()[:TRIED]:
        yield read(index[None])[0]


def _first_good(
    candidates: Iterator[Encoded],
    draws: np.ndarray,
    crop: Callable[..., list[np.ndarray]],
    out: np.ndarray,
    bad: list[str],
) -> int:
    """Crops the first candidate that can be decoded into `out`, and gives its label."""
    for where, image, label in candidates:
        try:
            for view, pixels in zip(out, crop(where, image, draws), strict=True):
                view[:] = pixels
            return label
        except DecodeError as error:
            bad.append(str(error))
    raise ValueError(f"{len(bad)} images in turn cannot be decoded; the last: {bad[-1]}")


def _take(chunk: Chunk, batch: Batch, row: int, count: int) -> list[str]:
    """Copy a chunk to its rows of the batch, and pass on which images are bad."""
    rows = slice(row, row + count)
    batch["image"][rows] = chunk.images[:count]
    batch["label"][rows] = chunk.labels.reshape(batch["label"][rows].shape)
    return chunk.bad


def _report(
    bad: list[str], known: dict[str, None], images: int, warn: Callable[[str], None]
) -> None:
    """Warn of each bad image once; give up when they are more than their share of the images."""
    for line in bad:
        if line not in known:
            known[line] = None
            warn(f"{line}; the next image stands in for it (bad images so far: {len(known)})")
    refuse_many(list(known), images)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _chunks(fill: Fill, numbers: range, shape: tuple[int, ...], workers: int) -> Generator[Chunk]:
    """The chunks with these numbers, in order; the images of one are gone when the next is taken.

    Args:
      fill: `(number, out) -> (labels, bad)`, writes the images to `out`.
      numbers: of the chunks.
      shape: of the images of the largest chunk.
      workers: processes; 0: threads of this process.
    """
    if workers:
        return _from_processes(fill, numbers, shape, workers)
    return _from_threads(fill, numbers, shape)


def _from_threads(fill: Fill, numbers: range, shape: tuple[int, ...]) -> Generator[Chunk]:
    threads, remaining = usable_cores(), iter(numbers)
    slots = np.empty((AHEAD * threads, *shape), np.uint8)  # used again and again, as below

    def make(number: int) -> Chunk:
        out = slots[number % len(slots)]
        return Chunk(out, *fill(number, out))

    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(make, number) for number in islice(remaining, len(slots)))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(make, number) for number in islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)


# Grain starts the worker processes, gives each its numbers and keeps the order. The images come
# through slots of one shared memory, used again and again: new memory costs as much as copying.
# Chunk n is in slot n modulo their number, where a worker waits until the one before was taken.
# In front of the slots are a byte that says STOP, and one for each slot that says FREE or FULL.


def _from_processes(
    fill: Fill, numbers: range, shape: tuple[int, ...], workers: int
) -> Generator[Chunk]:
    grain = _grain()
    slots = (AHEAD * workers, *shape)
    with _shared_memory(1 + slots[0] + math.prod(slots), workers) as memory:
        dataset = grain.MapDataset.range(numbers.start, numbers.stop)
        dataset = dataset.map(partial(_fill_slot, fill=fill, memory=memory.name, slots=slots))
        dataset = dataset.to_iter_dataset(grain.ReadOptions(0, 0))
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        with closing(iter(dataset.mp_prefetch(options, _start_worker))) as filled:
            stop = util.Finalize(None, _stop, (memory,), exitpriority=10)  # before Grain's own
            try:
                for number, (labels, bad) in zip(numbers, filled, strict=True):
                    classes = np.frombuffer(labels, np.int32)
                    yield Chunk(_slot(memory, slots, number), classes, bad)
                    _states(memory)[1 + number % slots[0]] = FREE
            finally:
                stop()


def _fill_slot(
    number: int, *, fill: Fill, memory: str, slots: tuple[int, ...]
) -> tuple[bytes, list[str]]:
    """What a worker does with the number of a chunk."""
    shared, state = _attached(memory), 1 + number % slots[0]
    while _states(shared)[state] == FULL and _states(shared)[0] != STOP:
        time.sleep(0.005)
    labels, bad = fill(number, _slot(shared, slots, number))
    _states(shared)[state] = FULL
    return labels.tobytes(), bad


def _slot(memory: SharedMemory, slots: tuple[int, ...], number: int) -> np.ndarray:
    """The images of a chunk."""
    count, *shape = slots
    start = 1 + count + (number % count) * math.prod(shape)
    return np.ndarray(shape, np.uint8, memory.buf, start)


def _states(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def _stop(memory: SharedMemory) -> None:
    """No worker waits for a slot any longer, so that all see that they are to end."""
    _states(memory)[0] = STOP


@contextmanager
def _shared_memory(size: int, workers: int) -> Iterator[SharedMemory]:
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else math.inf
    if size > free:
        raise ValueError(
            f"{workers} workers need {size / 1e6:.0f} MB of shared memory, {SHARED} has "
            f"{free / 1e6:.0f} MB free: give the container more (docker run --shm-size), or use "
            "fewer workers, or 0: threads of this process"
        )
    memory = SharedMemory(create=True, size=size)
    unlink = util.Finalize(None, memory.unlink, exitpriority=0)  # at the latest at exit
    try:
        yield memory
    finally:
        unlink()
        with suppress(BufferError):  # an array in a traceback: freed with it
            memory.close()


_attached = cache(SharedMemory)  # once a worker


def _start_worker(index: int, count: int) -> None:
    """A worker uses one thread and no accelerator, and ends when the main process does."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process decides what these mean
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_main, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
    if (cv2 := opencv()) is not None:
        cv2.setNumThreads(1)


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _grain() -> ModuleType:
    try:
        grain = import_module("grain")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "worker processes need Grain: pip install grain; or use 0 workers: threads"
        ) from None
    flags = import_module("absl.flags").FLAGS
    for name in flags:
        if name.startswith("grain_"):  # Grain reads them, also where nobody has parsed flags
            flags[name].present = True
    return grain
