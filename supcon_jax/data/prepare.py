"""Prepare a TFDS data set for `tfds.data_source`, without TensorFlow.

    python -m supcon_jax.data.prepare cifar10
    python -m supcon_jax.data.prepare cifar10 --from_dir DIR --data_dir DIR

The images are written in the array_record format, which `tfds.data_source` reads without
TensorFlow too. TFDS's own builders say what a data set holds and which SHA-256 checksums the source
files must have, wherever they come from; only their TensorFlow calls (unpack, encode PNG) are
replaced. SVHN's "extra" and STL-10's "unlabelled" images are left out.
"""

import contextlib
import gzip
import io
import itertools
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from supcon_jax.terminal import fail, parser

DEBIAN_DIR = "/usr/share/datasets/fashion-mnist"

# The file names, with the time in the gzip header of the original.
_ORIGINAL_MTIME: Mapping[str, int] = {
    "train-images-idx3-ubyte.gz": 1504176606,
    "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627,
    "t10k-labels-idx1-ubyte.gz": 1504176627,
}
_REACH_SECONDS = 10

Columns = dict[str, Any]  # "image" [n, h, w] or [n, h, w, c] uint8, and lists of other features
Contents = tuple[dict[str, list[str]], dict[str, Columns]]  # class names of features; splits


class PrepareError(Exception):
    """The data set could not be prepared; the message is one line for the user."""


class Known(NamedTuple):
    """What is known of a data set beyond what TFDS knows.

    Attributes:
      urls: of the source files, as TFDS has them registered with their checksums.
      megabytes: to download.
      read: `{file name: path} -> (class names that the files tell, splits)`.
    """

    urls: tuple[str, ...]
    megabytes: int
    read: Callable[[Mapping[str, Path]], Contents]

    @property
    def files(self) -> dict[str, str]:
        """File name -> URL."""
        return {url.rpartition("/")[2]: url for url in self.urls}


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    from_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes a data set for `tfds.data_source`.

    A data set that is there already is left as it is.

    Args:
      name: one of `KNOWN`.
      data_dir: TFDS's root folder; its own default (`TFDS_DATA_DIR` or `~/tensorflow_datasets`)
        if None.
      from_dir: folder with the source files as published (Fashion-MNIST also as in Debian's package
        `dataset-fashion-mnist`); they are downloaded if None.

    Returns:
      The folder written: `data_dir/NAME/VERSION`.

    Raises:
      PrepareError: if a source file is missing, cannot be downloaded or is not the original, if
        `data_dir` cannot be written, or if it holds the data set in another format.
    """
    tfds = _import_tfds()
    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = _without_tensorflow(tfds, name, data_dir)
    path = Path(builder.data_path)
    if path.exists():
        _check_format(builder)
        print(f"{name} is already prepared in {path}")
        return path
    with tempfile.TemporaryDirectory() as scratch:
        if from_dir is None:
            _check_reachable(name)
        else:
            from_dir = _originals(name, Path(from_dir), Path(scratch))
        _check_writable(data_dir)
        with _one_line_errors(tfds, name):
            builder.download_and_prepare(
                file_format="array_record",
                download_dir=None if from_dir is None else scratch,
                download_config=tfds.download.DownloadConfig(
                    manual_dir=from_dir, force_checksums_validation=True, try_download_gcs=False
                ),
            )
    print(f"{name} is prepared in {path}")
    return path


def _import_tfds() -> Any:
    try:
        import array_record  # noqa: F401  TFDS imports it late, when the images are written.
        import tensorflow_datasets
    except ImportError as error:
        raise PrepareError(
            f'{error}: pip install "supcon-jax[train]" has what the data sets need'
        ) from error
    return tensorflow_datasets


def _without_tensorflow(tfds: Any, name: str, data_dir: Path) -> Any:
    """TFDS's own builder, with the part that needs TensorFlow replaced."""
    builder = tfds.builder_cls(name)(data_dir=data_dir)
    builder._split_generators = partial(_splits, KNOWN[name], builder)
    return builder


def _splits(known: Known, builder: Any, downloads: Any) -> dict[str, Iterator[Any]]:
    files = {file: Path(path) for file, path in downloads.download(known.files).items()}
    class_names, splits = known.read(files)
    for feature, names in class_names.items():
        builder.info.features[feature].names = names
    return {split: _examples(columns) for split, columns in splits.items()}


def _examples(columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(columns["image"])):
        example = {feature: values[index] for feature, values in columns.items()}
        yield index, {**example, "image": _png(example["image"])}


def _png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def _fashion_mnist(files: Mapping[str, Path]) -> Contents:
    splits: dict[str, Columns] = {
        split: {
            "image": read_idx(files[f"{stem}-images-idx3-ubyte.gz"]),
            "label": read_idx(files[f"{stem}-labels-idx1-ubyte.gz"]).tolist(),
        }
        for split, stem in (("train", "train"), ("test", "t10k"))
    }
    return {}, splits


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a gzipped IDX file of bytes, the format of the MNIST family.

    Args:
      path: the .gz file.

    Returns:
      uint8 array: images `[n, h, w]` or labels `[n]`.
    """
    data = gzip.decompress(Path(path).read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _cifar(
    files: Mapping[str, Path], *, splits: dict[str, list[str]], names: dict[str, str]
) -> Contents:
    """Records of one byte a label (in the order of `names`) and three planes of 32 x 32."""
    (archive,) = files.values()
    found = read_tar(archive, [*itertools.chain(*splits.values()), *names.values()])
    columns: dict[str, Columns] = {}
    for split, parts in splits.items():
        data = np.frombuffer(b"".join(found[part] for part in parts), np.uint8)
        records = data.reshape(-1, len(names) + 3072)
        columns[split] = {
            "id": [f"{split}_{index:05d}" for index in range(len(records))],
            "image": records[:, len(names) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
            **{label: records[:, place].tolist() for place, label in enumerate(names)},
        }
    return {label: _lines(found[file]) for label, file in names.items()}, columns


def _svhn(files: Mapping[str, Path]) -> Contents:
    """MATLAB files: "X" `[32, 32, 3, n]`, "y" `[n, 1]` from 1 to 10, where 10 is the digit 0."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    columns: dict[str, Columns] = {}
    for split in ("train", "test"):
        data = loadmat(files[f"{split}_32x32.mat"])
        labels = (data["y"][:, 0] % 10).tolist()
        columns[split] = {
            "id": [f"{split}_{index:06d}" for index in range(len(labels))],
            "image": np.moveaxis(data["X"], -1, 0),
            "label": labels,
        }
    return {}, columns


def _stl10(files: Mapping[str, Path]) -> Contents:
    """Images of three planes, each column after column; labels from 1."""
    (archive,) = files.values()
    splits = ("train", "test")
    names = "class_names.txt"
    found = read_tar(
        archive, [f"{split}_{part}.bin" for split in splits for part in "Xy"] + [names]
    )
    columns: dict[str, Columns] = {}
    for split in splits:
        planes = np.frombuffer(found[f"{split}_X.bin"], np.uint8).reshape(-1, 3, 96, 96)
        labels = np.frombuffer(found[f"{split}_y.bin"], np.uint8).astype(int) - 1
        columns[split] = {"image": planes.transpose(0, 3, 2, 1), "label": labels.tolist()}
    return {"label": _lines(found[names])}, columns


def read_tar(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, bytes]:
    """Reads some files of a tar archive, whatever folder of it they are in.

    Args:
      path: the archive, compressed or not.
      names: of the files wanted, without folders.

    Returns:
      What each of them holds.

    Raises:
      PrepareError: the archive lacks one.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in names and (file := archive.extractfile(member)):
                found[name] = file.read()
            if len(found) == len(names):
                return found
    raise PrepareError(f"{path} lacks {', '.join(n for n in names if n not in found)}")


def _lines(text: bytes) -> list[str]:
    return [line for line in text.decode().splitlines() if line]


KNOWN: dict[str, Known] = {
    "fashion_mnist": Known(
        tuple(
            f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}"
            for name in _ORIGINAL_MTIME
        ),
        31,
        _fashion_mnist,
    ),
    "cifar10": Known(
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        170,
        partial(
            _cifar,
            splits={
                "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
                "test": ["test_batch.bin"],
            },
            names={"label": "batches.meta.txt"},
        ),
    ),
    "cifar100": Known(
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        169,
        partial(
            _cifar,
            splits={"train": ["train.bin"], "test": ["test.bin"]},
            names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        ),
    ),
    "svhn_cropped": Known(
        tuple(
            f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat"
            for split in ("train", "test")
        ),
        246,
        _svhn,
    ),
    "stl10": Known(("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",), 2640, _stl10),
}


def _originals(name: str, from_dir: Path, target: Path) -> Path:
    """The folder with all source files as published: `from_dir`, or `target` after repacking."""
    files = KNOWN[name].files
    missing = [file for file in files if not (from_dir / file).is_file()]
    if missing:
        raise PrepareError(
            f"{from_dir} lacks {', '.join(missing)}: {_otherwise(name)}, and without --from_dir "
            "they are downloaded"
        )
    if not files.keys() <= _ORIGINAL_MTIME.keys():
        return from_dir
    for file, mtime in _ORIGINAL_MTIME.items():
        try:
            packed = (from_dir / file).read_bytes()
        except OSError as error:
            raise PrepareError(f"cannot read {from_dir / file}: {error.strerror}") from error
        (target / file).write_bytes(_with_original_header(packed, file, mtime))
    return target


def _with_original_header(packed: bytes, name: str, mtime: int) -> bytes:
    """Gives back the name and time that `gzip -n`, as Debian packs, has left out."""
    if packed[3:4] != b"\0":
        return packed
    stem = name.removesuffix(".gz").encode()
    return (
        b"\x1f\x8b\x08\x08" + mtime.to_bytes(4, "little") + b"\0\x03" + stem + b"\0" + packed[10:]
    )


def _otherwise(name: str) -> str:
    """Where else the source files are."""
    if name == "fashion_mnist":
        return f"apt-get install dataset-fashion-mnist puts them in {DEBIAN_DIR}"
    return f"get {' and '.join(KNOWN[name].urls)}"


def _check_format(builder: Any) -> None:
    found = builder.info.file_format.value
    if found != "array_record":
        raise PrepareError(
            f"{builder.data_path} holds {builder.name} as {found}, which only TensorFlow reads: "
            "choose another --data_dir or delete that folder"
        )


def _check_reachable(name: str) -> None:
    """One quick request with the library, and so the proxies, that TFDS downloads with."""
    import requests

    # TFDS itself tries ten times, so that a machine without a network would wait for minutes.
    url = KNOWN[name].urls[0]
    try:
        requests.head(url, timeout=_REACH_SECONDS)
    except requests.RequestException as error:
        raise PrepareError(
            f"cannot reach {url}: {_otherwise(name)}, and give that folder as --from_dir"
        ) from error


def _check_writable(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise PrepareError(f"cannot write to {data_dir}: {error.strerror}") from error


@contextlib.contextmanager
def _one_line_errors(tfds: Any, name: str) -> Iterator[None]:
    """What the user can mend becomes a `PrepareError`; anything else keeps its traceback."""
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        yield
    except NonMatchingChecksumError as error:
        file = next(file for file in KNOWN[name].files if file in str(error))
        raise PrepareError(
            f"{file} is not the original: its SHA-256 is not the one TFDS knows; get it again"
        ) from error
    except (OSError, tfds.download.DownloadError) as error:
        raise PrepareError(f"cannot prepare {name}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: arguments, those of the process if None.

    Raises:
      SystemExit: with status 1 and one line on stderr if the data set cannot be prepared.
    """
    command = parser("data.prepare", __doc__)
    sizes = ", ".join(f"{name} ({known.megabytes} MB)" for name, known in KNOWN.items())
    command.add_argument(
        "dataset", choices=KNOWN, metavar="NAME", help=f"what to prepare, and its download: {sizes}"
    )
    command.add_argument(
        "--data_dir", help="TFDS's root folder ($TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
    command.add_argument(
        "--from_dir",
        help="folder with the source files as published, or for fashion_mnist "
        f"{DEBIAN_DIR} of the Debian package dataset-fashion-mnist (else they are downloaded)",
    )
    options = command.parse_args(argv)
    try:
        if not sys.stderr.isatty():
            _import_tfds().disable_progress_bar()
        prepare(options.dataset, options.data_dir, options.from_dir)
    except PrepareError as error:
        fail(error, options.debug)


if __name__ == "__main__":
    main()
