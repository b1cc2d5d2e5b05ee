"""Fashion-MNIST prepared without TensorFlow, from Debian's files and through TFDS's download."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from data import tiny_tfds

from supcon_jax.data import prepare

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

DEBIAN = Path(prepare.DEBIAN_DIR)
needs_debian = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason=f"{DEBIAN} is missing: apt-get install dataset-fashion-mnist"
)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Serves the folder returned as every host of the web, by being the HTTP proxy."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return str(folder / Path(urllib.parse.urlparse(path).path).name)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _set_proxy(monkeypatch, server.server_port)
        yield folder
        server.shutdown()


def _set_proxy(monkeypatch, port):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")


def _damaged_copy(target):
    target.mkdir(exist_ok=True)
    for source in DEBIAN.glob("*.gz"):
        shutil.copy(source, target)
    damaged = target / "t10k-labels-idx1-ubyte.gz"
    data = bytearray(damaged.read_bytes())
    data[3000] ^= 1
    damaged.write_bytes(data)
    return target


def _rows(images, labels):
    """Each image with its label as one byte string, sorted: TFDS shuffles what it writes."""
    pixels = np.asarray(images).reshape(len(labels), -1)
    return sorted(p.tobytes() + bytes([y]) for p, y in zip(pixels, labels, strict=True))


def _check_prepared(data_dir):
    sources = tfds.data_source("fashion_mnist", data_dir=data_dir, download=False)
    for split, stem, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        examples = sources[split].__getitems__(range(len(sources[split])))
        labels = np.array([e["label"] for e in examples])
        assert len(examples) == size
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, size // 10))
        assert _rows([e["image"] for e in examples], labels) == _rows(
            prepare.read_idx(DEBIAN / f"{stem}-images-idx3-ubyte.gz"),
            prepare.read_idx(DEBIAN / f"{stem}-labels-idx1-ubyte.gz"),
        )


@needs_debian
@pytest.mark.slow
def test_prepared_from_debian_equals_the_raw_files(tmp_path, capsys):
    path = prepare.prepare_fashion_mnist(tmp_path, DEBIAN)
    _check_prepared(tmp_path)
    assert path.parent == tmp_path / "fashion_mnist"
    assert {p.name for p in tmp_path.iterdir()} == {"fashion_mnist"}

    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    capsys.readouterr()
    assert prepare.prepare_fashion_mnist(tmp_path, DEBIAN) == path
    assert "already prepared" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before


@needs_debian
@pytest.mark.slow
def test_prepared_from_the_web_equals_the_raw_files(tmp_path, web):
    prepare._restore_originals(DEBIAN, web)
    prepare.prepare_fashion_mnist(tmp_path / "data")
    _check_prepared(tmp_path / "data")


@needs_debian
def test_restored_files_are_the_published_ones(tmp_path):
    prepare._restore_originals(DEBIAN, tmp_path)
    known = tfds.builder_cls("fashion_mnist").url_infos.values()
    for info in known:
        found = tfds.core.download.checksums.compute_url_info(tmp_path / info.filename)
        assert (found.checksum, found.size) == (info.checksum, info.size)
    assert len(known) == 4


@needs_debian
def test_published_files_are_taken_as_they_are(tmp_path):
    originals, again = tmp_path / "a", tmp_path / "b"
    originals.mkdir()
    again.mkdir()
    prepare._restore_originals(DEBIAN, originals)
    prepare._restore_originals(originals, again)
    for path in originals.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@needs_debian
def test_damaged_file_is_refused(tmp_path):
    source = _damaged_copy(tmp_path / "source")
    with pytest.raises(prepare.PrepareError, match=r"^t10k-labels-idx1-ubyte\.gz is not the orig"):
        prepare.prepare_fashion_mnist(tmp_path / "data", source)
    assert not (tmp_path / "data/fashion_mnist/3.0.1").exists()


def test_damaged_download_is_refused(tmp_path, web):
    for name in prepare._ORIGINAL_MTIME:
        (web / name).write_bytes(b"not Fashion-MNIST")
    with pytest.raises(prepare.PrepareError, match="is not the original"):
        prepare.prepare_fashion_mnist(tmp_path / "data")


def test_download_that_the_server_lacks_is_one_line(tmp_path, web):
    with pytest.raises(prepare.PrepareError, match="HTTP code: 404"):
        prepare.prepare_fashion_mnist(tmp_path / "data")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "train-labels-idx1-ubyte.gz").touch()
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.prepare_fashion_mnist(tmp_path / "data", tmp_path)
    message = str(caught.value)
    assert "train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz" in message
    assert "train-labels-idx1-ubyte.gz" not in message
    assert "apt-get install dataset-fashion-mnist" in message and "--from_dir" in message
    assert not (tmp_path / "data").exists()


@needs_debian
def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(prepare.PrepareError, match=r"cannot write to .*file/sub: Not a directory"):
        prepare.prepare_fashion_mnist(tmp_path / "file/sub", DEBIAN)


def test_other_format_is_refused(tmp_path):
    builder = prepare._fashion_mnist_class(tfds)(data_dir=tmp_path)
    builder.info.set_file_format("tfrecord", override=True)
    builder.info.set_splits(tfds.core.splits.SplitDict([]))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    with pytest.raises(prepare.PrepareError, match=r"as tfrecord.*--data_dir"):
        prepare.prepare_fashion_mnist(tmp_path)


def test_command_without_a_network_fails_at_once_in_one_line(tmp_path, monkeypatch):
    _set_proxy(monkeypatch, 9)  # The discard port: nothing listens.
    args = ["fashion_mnist", "--data_dir", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "supcon_jax.data.prepare", *args],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot reach http://fashion-mnist")
    assert done.stderr.count("\n") == 1
    assert prepare.DEBIAN_DIR in done.stderr


def test_tiny_digits_holds_the_digits(tmp_path):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    name = tiny_tfds.prepare_digits(tmp_path, n_train=30, n_test=20)
    builder = tfds.builder_from_directory(tmp_path / name / "1.0.0")
    for split, part in (("train", slice(0, 30)), ("test", slice(30, 50))):
        examples = list(builder.as_data_source(split))
        images = np.stack([e["image"] for e in examples])
        assert images.shape == (len(examples), 8, 8, 1) and images.dtype == np.uint8
        assert _rows(images, [e["label"] for e in examples]) == _rows(
            (digits.images[part] * 15).astype(np.uint8), digits.target[part]
        )
