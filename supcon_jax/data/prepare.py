"""Prepares a TFDS data set without TensorFlow: `python -m supcon_jax.data.prepare fashion_mnist`.

The images are written in the array_record format, which `tfds.data_source` reads without
TensorFlow too. TFDS's registered SHA-256 checksums are required of the source files, wherever
they come from.
"""

import argparse
import contextlib
import gzip
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DEBIAN_DIR = "/usr/share/datasets/fashion-mnist"

# The file names, with the time in the gzip header of the original.
_ORIGINAL_MTIME: Mapping[str, int] = {
    "train-images-idx3-ubyte.gz": 1504176606,
    "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627,
    "t10k-labels-idx1-ubyte.gz": 1504176627,
}
_REACH_SECONDS = 10


class PrepareError(Exception):
    """The data set could not be prepared; the message is one line for the user."""


def prepare_fashion_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    from_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes Fashion-MNIST (60,000 training and 10,000 test images) for `tfds.data_source`.

    A data set that is there already is left as it is.

    Args:
      data_dir: TFDS's root folder; its own default (`TFDS_DATA_DIR` or `~/tensorflow_datasets`)
        if None.
      from_dir: folder with the four .gz files, as published or as in Debian's package
        `dataset-fashion-mnist`; they are downloaded if None.

    Returns:
      The folder written: `data_dir/fashion_mnist/<version>`.

    Raises:
      PrepareError: if a source file is missing, cannot be downloaded or is not the original, if
        `data_dir` cannot be written, or if it holds the data set in another format.
    """
    tfds = _import_tfds()
    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = _fashion_mnist_class(tfds)(data_dir=data_dir)
    path = Path(builder.data_path)
    if path.exists():
        _check_format(builder)
        print(f"fashion_mnist is already prepared in {path}")
        return path
    with tempfile.TemporaryDirectory() as scratch:
        if from_dir is None:
            _check_reachable(builder.URL)
        else:
            _restore_originals(Path(from_dir), Path(scratch))
        _check_writable(data_dir)
        with _one_line_errors(tfds):
            builder.download_and_prepare(
                file_format="array_record",
                download_dir=None if from_dir is None else scratch,
                download_config=tfds.download.DownloadConfig(
                    manual_dir=scratch, force_checksums_validation=True, try_download_gcs=False
                ),
            )
    print(f"fashion_mnist is prepared in {path}")
    return path


def _import_tfds() -> Any:
    try:
        import array_record  # noqa: F401  TFDS imports it late, when the images are written.
        import tensorflow_datasets
    except ImportError as error:
        raise PrepareError(
            f"{error}: pip install tensorflow-datasets importlib_resources array_record"
        ) from error
    return tensorflow_datasets


def _fashion_mnist_class(tfds: Any) -> type:
    """TFDS's own builder, with its two TensorFlow calls (unzip, encode PNG) replaced."""

    class FashionMNIST(tfds.builder_cls("fashion_mnist"), skip_registration=True):  # type: ignore
        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            files = dl_manager.download({name: self.URL + name for name in _ORIGINAL_MTIME})
            return {
                split: self._generate_examples(
                    files[f"{stem}-images-idx3-ubyte.gz"], files[f"{stem}-labels-idx1-ubyte.gz"]
                )
                for split, stem in (("train", "train"), ("test", "t10k"))
            }

        def _generate_examples(self, images: Any, labels: Any) -> Iterator[Any]:
            pairs = zip(read_idx(images), read_idx(labels), strict=True)
            for index, (image, label) in enumerate(pairs):
                yield index, {"image": _png(image), "label": int(label)}

    return FashionMNIST


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


def _png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def _restore_originals(from_dir: Path, target: Path) -> None:
    """Copies the four source files, undoing Debian's repacking."""
    missing = [name for name in _ORIGINAL_MTIME if not (from_dir / name).is_file()]
    if missing:
        raise PrepareError(
            f"{from_dir} lacks {', '.join(missing)}: apt-get install dataset-fashion-mnist "
            f"puts them in {DEBIAN_DIR}, and without --from_dir they are downloaded"
        )
    for name, mtime in _ORIGINAL_MTIME.items():
        try:
            packed = (from_dir / name).read_bytes()
        except OSError as error:
            raise PrepareError(f"cannot read {from_dir / name}: {error.strerror}") from error
        (target / name).write_bytes(_with_original_header(packed, name, mtime))


def _with_original_header(packed: bytes, name: str, mtime: int) -> bytes:
    """Gives back the name and time that `gzip -n`, as Debian packs, has left out."""
    if packed[3:4] != b"\0":
        return packed
    stem = name.removesuffix(".gz").encode()
    return (
        b"\x1f\x8b\x08\x08" + mtime.to_bytes(4, "little") + b"\0\x03" + stem + b"\0" + packed[10:]
    )


def _check_format(builder: Any) -> None:
    found = builder.info.file_format.value
    if found != "array_record":
        raise PrepareError(
            f"{builder.data_path} holds fashion_mnist as {found}, which only TensorFlow reads: "
            "choose another --data_dir or delete that folder"
        )


def _check_reachable(url: str) -> None:
    """One quick request with the library, and so the proxies, that TFDS downloads with."""
    import requests

    # TFDS itself tries ten times, so that a machine without a network would wait for minutes.
    try:
        requests.head(url, timeout=_REACH_SECONDS)
    except requests.RequestException as error:
        raise PrepareError(
            f"cannot reach {url}: apt-get install dataset-fashion-mnist and give "
            f"--from_dir {DEBIAN_DIR}"
        ) from error


def _check_writable(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise PrepareError(f"cannot write to {data_dir}: {error.strerror}") from error


@contextlib.contextmanager
def _one_line_errors(tfds: Any) -> Iterator[None]:
    """What the user can mend becomes a `PrepareError`; anything else keeps its traceback."""
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        yield
    except NonMatchingChecksumError as error:
        name = next(name for name in _ORIGINAL_MTIME if name in str(error))
        raise PrepareError(
            f"{name} is not the original: its SHA-256 is not the one TFDS knows; get it again"
        ) from error
    except (OSError, tfds.download.DownloadError) as error:
        raise PrepareError(f"cannot prepare fashion_mnist: {error}") from error


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m supcon_jax.data.prepare",
        description="Prepare a TFDS data set in array_record format, without TensorFlow.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dataset", choices=["fashion_mnist"], help="name of the data set")
    parser.add_argument(
        "--data_dir",
        help="TFDS's root folder; None means $TFDS_DATA_DIR or ~/tensorflow_datasets",
    )
    parser.add_argument(
        "--from_dir",
        help=f"folder with the four .gz source files, for example {DEBIAN_DIR} of the Debian "
        "package dataset-fashion-mnist; None means that TFDS downloads them (31 MB)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: arguments, those of the process if None.

    Raises:
      SystemExit: with status 1 and one line on stderr if the data set cannot be prepared.
    """
    args = _parse(argv)
    try:
        if not sys.stderr.isatty():
            _import_tfds().disable_progress_bar()
        prepare_fashion_mnist(args.data_dir, args.from_dir)
    except PrepareError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
