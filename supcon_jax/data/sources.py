"""Where images and labels come from: digits, image folders, TFDS; one small interface for all."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from supcon_jax.data.decode import DecodeError, fit, middle_square, usable_cores
from supcon_jax.data.prepare import KNOWN

BAD_SHARE = 0.01  # of the images may be undecodable where they are skipped
NAMED = 3  # of those that are left out, in the warning

Loaded = tuple[np.ndarray, np.ndarray]  # images [n, H, W, C] uint8, labels [n] int32


class Encoded(NamedTuple):
    """An image that is not decoded yet: where it is, for messages; its file or bytes; its label."""

    where: str
    image: Path | bytes
    label: int


@dataclass(frozen=True)
class Source:
    """One split of a data set, with random access.

    Attributes:
      name: for messages.
      size: number of images.
      class_names: label k is `class_names[k]`.
      image_shape: height, width and channels of every loaded image.
      load: `indices [n] -> (images [n, H, W, C] uint8, labels [n] int32)`.
      labels: `() -> [size] int32`, all labels without decoding an image.
      read: `indices [n] -> n encoded images`; None where the images are decoded in memory.
    """

    name: str
    size: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    load: Callable[[np.ndarray], Loaded]
    labels: Callable[[], np.ndarray]
    read: Callable[[np.ndarray], list[Encoded]] | None = None


def open_source(
    source: str,
    split: str,
    *,
    name: str,
    directory: str,
    load_size: int,
    channels: int,
    memory_limit_gb: float,
) -> Source:
    """A split of a data set, decoded into memory once where it fits, else image by image.

    Args:
      source: name in `SOURCES`: "digits", "folder" or "tfds".
      split: name of the split, as the source calls it.
      name: of the TFDS data set; not used by the others.
      directory: of the image folder, or TFDS's `data_dir` ("": its default).
      load_size: images are scaled to this short side, then cut to the middle square.
      channels: 1 (grey) or 3 (RGB).
      memory_limit_gb: largest size of a split that is kept decoded in memory, in GB.

    Returns:
      The source.

    Raises:
      FileNotFoundError: the data set or split is not there; the message says how to get it.
      ValueError: an undecodable image, an empty class, a label out of range, images of another
        shape than asked for.
    """
    shape = (load_size, load_size, channels)
    found = SOURCES[source](split, name=name, directory=directory, shape=shape)
    if found.size == 0:
        raise ValueError(f"{found.name} has no images")
    if tuple(found.image_shape) != shape:
        raise ValueError(
            f"{found.name} has images of shape {tuple(found.image_shape)}, asked for are {shape}: "
            "set --config.data.load_size (images are squares) and --config.data.channels"
        )
    return in_memory_if_small(found, memory_limit_gb)


def in_memory_if_small(source: Source, memory_limit_gb: float) -> Source:
    """The source, with all images decoded where they need at most so many GB."""
    return in_memory(source) if is_small(source, memory_limit_gb) else source


def is_small(source: Source, memory_limit_gb: float) -> bool:
    """Whether all images, decoded, need at most so many GB."""
    return bool(source.size * np.prod(source.image_shape) <= memory_limit_gb * 1e9)


def in_memory(source: Source) -> Source:
    """The same source with all images decoded."""
    return _of_arrays(source, *source.load(np.arange(source.size)))


def from_arrays(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> Source:
    """A source of images that are in memory.

    Args:
      name: for messages.
      images: `[n, height, width, channels]` uint8.
      labels: `[n]` integers; label k is `class_names[k]`.
      class_names: of all classes.

    Raises:
      ValueError: other shapes or types, or a label without a name.
    """
    labels = np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"images of {name} must be [n, height, width, channels] uint8, got "
            f"{list(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels of {name} must be [{len(images)}] integers, got {list(labels.shape)} "
            f"{labels.dtype}"
        )
    known = (labels >= 0) & (labels < len(class_names))
    if not known.all():
        raise ValueError(
            f"{name}: image {known.argmin()} has label {labels[known.argmin()]}, expected 0 to "
            f"{len(class_names) - 1}"
        )
    shape, labels = images.shape[1:], labels.astype(np.int32)
    return Source(
        name,
        len(images),
        tuple(class_names),
        shape,
        lambda indices: (images[indices], labels[indices]),
        lambda: labels,
    )


def _of_arrays(source: Source, images: np.ndarray, labels: np.ndarray) -> Source:
    return replace(
        source,
        load=lambda indices: (images[indices], labels[indices]),
        labels=lambda: labels,
        read=None,
    )


def decodable(source: Source, *, of: int, warn: Callable[[str], None]) -> Source:
    """The images of a source that can be decoded, found by decoding each of them.

    Args:
      source: the images; where they are in memory already, all of them can.
      of: size of the split that the source is a part of: 1 % of that may be undecodable.
      warn: gets a line with the count and the first of those that are left out, if there are any.

    Returns:
      The source without them.

    Raises:
      ValueError: more than 1 % of them.
    """
    bad = {} if source.read is None else _undecodable(source)
    if not bad:
        return source
    lines = list(bad.values())
    refuse_many(lines, of)
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    warn(
        f"{source.name}: {len(bad)} of {source.size} images cannot be decoded and are left out: "
        f"{'; '.join(lines[:NAMED])}{more}"
    )
    return subset(source, np.delete(np.arange(source.size), list(bad)), source.name)


def _undecodable(source: Source) -> dict[int, str]:
    """The numbers of the images that cannot be decoded, in order, and why."""

    def among(indices: np.ndarray) -> dict[int, str]:
        try:
            source.load(indices)
        except DecodeError as error:
            if len(indices) == 1:
                return {int(indices[0]): str(error)}
            first, second = np.array_split(indices, 2)
            return among(first) | among(second)
        return {}

    parts = np.array_split(np.arange(source.size), -(-source.size // 64) or 1)
    with ThreadPoolExecutor(usable_cores()) as pool:
        return {i: line for found in pool.map(among, parts) for i, line in found.items()}


def refuse_many(bad: Sequence[str], images: int) -> None:
    """Raise a ValueError where more than `BAD_SHARE` of so many images are bad; a line for each."""
    if len(bad) > BAD_SHARE * images:
        raise ValueError(
            f"{len(bad)} images cannot be decoded, more than {BAD_SHARE:.0%} of {images}; "
            f"the last: {bad[-1]}"
        )


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    """Some of the images of a source, under a name of their own."""
    read = source.read
    return replace(
        source,
        name=name,
        size=len(indices),
        load=lambda chosen: source.load(indices[chosen]),
        labels=lambda: source.labels()[indices],
        read=None if read is None else lambda chosen: read(indices[chosen]),
    )


def join(first: Source, second: Source, name: str) -> Source:
    """The images of one source, then those of another with the same classes and image shape."""

    def parts(indices: np.ndarray) -> list[tuple[Source, np.ndarray, np.ndarray]]:
        later = indices >= first.size
        both = (first, ~later, indices[~later]), (second, later, indices[later] - first.size)
        return [(source, np.flatnonzero(there), i) for source, there, i in both if len(i)]

    def load(indices: np.ndarray) -> Loaded:
        images = np.empty((len(indices), *first.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for source, places, chosen in parts(indices):
            images[places], labels[places] = source.load(chosen)
        return images, labels

    def read(indices: np.ndarray) -> list[Encoded]:
        rows: dict[int, Encoded] = {}
        for source, places, chosen in parts(indices):
            assert source.read is not None
            rows |= dict(zip(places, source.read(chosen), strict=True))
        return [rows[place] for place in range(len(indices))]

    return replace(
        first,
        name=name,
        size=first.size + second.size,
        load=load,
        labels=lambda: np.concatenate([first.labels(), second.labels()]),
        read=None if first.read is None or second.read is None else read,
    )


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Training images, and the share of them that is held out to look at during training.

    The choice is fixed (seed 0), so that runs with different seeds hold out the same images.
    """
    order = np.random.RandomState(0).permutation(source.size)
    count = round(fraction * source.size)
    return (
        subset(source, np.sort(order[count:]), source.name),
        subset(source, np.sort(order[:count]), f"{source.name} (held out)"),
    )


def _digits(split: str, *, shape: tuple[int, int, int], **_: Any) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 0 to 16 (UCI, Alpaydin and Kaynak).

    "train" and "test" are a stratified 80/20 split with seed 0; "first1437" and "last360" split in
    file order, where the last writers are other people than the first.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    everything = np.arange(len(labels))
    train, test = train_test_split(everything, test_size=0.2, random_state=0, stratify=labels)
    splits = {
        "train": train,
        "test": test,
        "first1437": everything[:-360],
        "last360": everything[-360:],
    }
    if split not in splits:
        raise FileNotFoundError(f"digits has the splits {', '.join(splits)}, not {split!r}")
    chosen = splits[split]
    eight_bit = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    options = {"size": shape[0], "channels": shape[2]}
    targets = labels[chosen].astype(np.int32)

    def load(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *shape), np.uint8)
        for place, image in enumerate(eight_bit[indices]):
            images[place] = fit(Image.fromarray(image), **options)
        return images, targets[indices]

    names = tuple(str(digit) for digit in range(10))
    return Source(
        f"digits/{split}",
        len(chosen),
        names,
        shape,
        load,
        lambda: targets,
    )


def _folder(split: str, *, directory: str, shape: tuple[int, int, int], **_: Any) -> Source:
    """Images in `directory/split/class/image`, in any format that Pillow reads."""
    if not directory:
        raise FileNotFoundError(
            "no folder of images is given: set --config.data.dir=PATH, with PATH/SPLIT/CLASS/IMAGE"
        )
    root = Path(directory).expanduser()
    folder = root / split
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise FileNotFoundError(
            f"no image folder {folder}: expected {root}/SPLIT/CLASS/IMAGE"
            + (f", found the splits {', '.join(there)}" if there else "")
            + "; set --config.data.dir and the names of its splits, --config.data.train_split and "
            "--config.data.test_split"
        )
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
    if not names:
        raise ValueError(f"{folder} has no class folders: expected {root}/SPLIT/CLASS/IMAGE")
    files = [[p for p in sorted((folder / name).rglob("*")) if _is_image(p)] for name in names]
    for name, of_class in zip(names, files, strict=True):
        if not of_class:
            raise ValueError(f"class folder {folder / name} has no images: add some or remove it")
    # One array, not a million objects: worker processes get a copy each.
    paths = np.array([os.fsencode(path) for of_class in files for path in of_class])
    labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(f) for f in files])
    read = partial(_read_files, paths, labels)
    return Source(str(folder), len(paths), names, shape, decoder(read, shape), lambda: labels, read)


def _read_files(paths: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> list[Encoded]:
    found = [os.fsdecode(path) for path in paths[indices]]
    return [Encoded(f, Path(f), int(k)) for f, k in zip(found, labels[indices], strict=True)]


def _is_image(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _tfds(
    split: str, *, name: str, directory: str, shape: tuple[int, int, int], **_: Any
) -> Source:
    """A prepared TFDS data set with the features "image" and "label", read without TensorFlow."""
    prepared = find_tfds(name, directory)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(prepared))
    if split not in builder.info.splits:
        raise FileNotFoundError(
            f"{name} in {prepared} has the splits {', '.join(builder.info.splits)}, not {split!r}"
        )
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    names = tuple(builder.info.features["label"].names)

    read = partial(_read_records, records, f"{name}/{split}", len(names))

    @cache  # it takes as long as reading the whole split
    def labels() -> np.ndarray:
        parts = np.array_split(np.arange(len(records)), -(-len(records) // 1000))
        return np.array([row.label for part in parts for row in read(part)], np.int32)

    load = decoder(read, shape)
    return Source(f"{name}/{split}", len(records), names, shape, load, labels, read)


def _read_records(records: Any, name: str, classes: int, indices: np.ndarray) -> list[Encoded]:
    rows = records.__getitems__([int(i) for i in indices])
    for i, row in zip(indices, rows, strict=True):
        if not 0 <= row["label"] < classes:
            raise ValueError(
                f"{name}: record {i} has label {row['label']}, expected 0 to {classes - 1}"
            )
    return [
        Encoded(f"{name} record {i}", row["image"], int(row["label"]))
        for i, row in zip(indices, rows, strict=True)
    ]


def split_names(source: str, *, name: str, directory: str) -> tuple[str, ...]:
    """The splits that a data set has; none where a folder is not there.

    Args:
      source: "digits", "folder" or "tfds".
      name: as `open_source`.
      directory: as `open_source`.

    Raises:
      FileNotFoundError: no such TFDS data set.
    """
    if source == "digits":
        return ("train", "test")
    if source == "folder":
        root = Path(directory).expanduser()
        found = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        return tuple(found)
    info = json.loads((find_tfds(name, directory) / "dataset_info.json").read_text())
    return tuple(split["name"] for split in info["splits"])


def find_tfds(name: str, directory: str) -> Path:
    """The folder of the newest prepared version of a TFDS data set, without opening it.

    Raises:
      FileNotFoundError: nothing there; the message says how to prepare it.
      ValueError: prepared in a format that needs TensorFlow to read.
    """
    if not name:
        raise ValueError("set --config.data.name to the name of the TFDS data set")
    root = _tfds_root(directory)
    infos = _infos(name, directory)
    if not infos:
        how = (
            f"python -m supcon_jax.data.prepare {name} --data_dir {root}"
            if name in KNOWN
            else f"tfds build {name} --file_format=array_record --data_dir={root} "
            f"(needs TensorFlow; see https://www.tensorflow.org/datasets/catalog/{name})"
        )
        raise FileNotFoundError(
            f"data set {name!r} is not in {root}. Prepare it: {how}. Or point --config.data.dir to "
            "where it is, or use a folder: --config.data.source=folder --config.data.dir=PATH"
        )
    form = json.loads(infos[-1].read_text()).get("fileFormat", "tfrecord")
    if form not in ("array_record", "parquet"):
        raise ValueError(
            f"{infos[-1].parent} is stored as {form}, which only TensorFlow reads; convert it: "
            f"tfds convert_format --dataset_dir={infos[-1].parent} --out_file_format=array_record"
        )
    return infos[-1].parent


def is_prepared(name: str, directory: str) -> bool:
    """Whether some version of a TFDS data set is there, in whatever format."""
    return bool(_infos(name, directory))


def _tfds_root(directory: str) -> Path:
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(directory or default).expanduser()


def _infos(name: str, directory: str) -> list[Path]:
    return sorted((_tfds_root(directory) / name).glob("**/dataset_info.json"), key=_version)


def _version(info: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in info.parent.name.split("."))


def decoder(
    read: Callable[[np.ndarray], list[Encoded]], shape: tuple[int, int, int]
) -> Callable[[np.ndarray], Loaded]:
    """`load` of a source, from its `read`: images scaled to the short side, then the middle square.

    Args:
      read: `indices [n] -> n encoded images`. A split that is not kept in memory is read by worker
        processes, to which it is pickled: a function of a module, or a `partial` of one.
      shape: height, width (the same) and channels of the loaded images.

    Raises:
      DecodeError: of the loading, an image that cannot be decoded; the message says where it is.
    """

    def load(indices: np.ndarray) -> Loaded:
        rows = read(indices)
        images = np.empty((len(rows), *shape), np.uint8)

        def fill(start: int) -> None:
            for place in range(start, min(start + 64, len(rows))):
                where, image, _ = rows[place]
                images[place] = middle_square(where, image, size=shape[0], channels=shape[2])

        with ThreadPoolExecutor(usable_cores()) as pool:  # decoding is done without the GIL
            list(pool.map(fill, range(0, len(rows), 64)))
        return images, np.array([row.label for row in rows], np.int32)

    return load


# Values of `config.data.source`: `(split, *, name, directory, shape) -> source`.
SOURCES: dict[str, Callable[..., Source]] = {"digits": _digits, "folder": _folder, "tfds": _tfds}
