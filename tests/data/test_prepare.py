"""Data sets prepared without TensorFlow: what comes out is what TFDS's own builders read."""

import hashlib
import http.server
import importlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tfds
from sklearn.datasets import load_sample_image

from supcon_jax.data import prepare
from supcon_jax.data.sources import open_source

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
scipy_io = pytest.importorskip("scipy.io")

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
    path = prepare.prepare("fashion_mnist", tmp_path, DEBIAN)
    _check_prepared(tmp_path)
    assert path.parent == tmp_path / "fashion_mnist"
    assert {p.name for p in tmp_path.iterdir()} == {"fashion_mnist"}

    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    capsys.readouterr()
    assert prepare.prepare("fashion_mnist", tmp_path, DEBIAN) == path
    assert "already prepared" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before


@needs_debian
@pytest.mark.slow
def test_prepared_from_the_web_equals_the_raw_files(tmp_path, web):
    prepare._originals("fashion_mnist", DEBIAN, web)
    prepare.prepare("fashion_mnist", tmp_path / "data")
    _check_prepared(tmp_path / "data")


@needs_debian
def test_restored_files_are_the_published_ones(tmp_path):
    prepare._originals("fashion_mnist", DEBIAN, tmp_path)
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
    prepare._originals("fashion_mnist", DEBIAN, originals)
    prepare._originals("fashion_mnist", originals, again)
    for path in originals.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@needs_debian
def test_damaged_file_is_refused(tmp_path):
    source = _damaged_copy(tmp_path / "source")
    with pytest.raises(prepare.PrepareError, match=r"^t10k-labels-idx1-ubyte\.gz is not the orig"):
        prepare.prepare("fashion_mnist", tmp_path / "data", source)
    assert not (tmp_path / "data/fashion_mnist/3.0.1").exists()


def test_damaged_download_is_refused(tmp_path, web):
    for name in prepare._ORIGINAL_MTIME:
        (web / name).write_bytes(b"not Fashion-MNIST")
    with pytest.raises(prepare.PrepareError, match="is not the original"):
        prepare.prepare("fashion_mnist", tmp_path / "data")


def test_download_that_the_server_lacks_is_one_line(tmp_path, web):
    with pytest.raises(prepare.PrepareError, match="HTTP code: 404"):
        prepare.prepare("fashion_mnist", tmp_path / "data")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "train-labels-idx1-ubyte.gz").touch()
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.prepare("fashion_mnist", tmp_path / "data", tmp_path)
    message = str(caught.value)
    assert "train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz" in message
    assert "train-labels-idx1-ubyte.gz" not in message
    assert "apt-get install dataset-fashion-mnist" in message and "--from_dir" in message
    assert not (tmp_path / "data").exists()


@needs_debian
def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(prepare.PrepareError, match=r"cannot write to .*file/sub: Not a directory"):
        prepare.prepare("fashion_mnist", tmp_path / "file/sub", DEBIAN)


def test_other_format_is_refused(tmp_path):
    builder = prepare._without_tensorflow(tfds, "fashion_mnist", tmp_path)
    builder.info.set_file_format("tfrecord", override=True)
    builder.info.set_splits(tfds.core.splits.SplitDict([]))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    with pytest.raises(prepare.PrepareError, match=r"as tfrecord.*--data_dir"):
        prepare.prepare("fashion_mnist", tmp_path)


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


# Archives in the published layouts, with a few parts of photographs in place of the images.


N_TRAIN, N_TEST = 20, 6
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def photographs(count, side, seed):
    """Parts of a photograph at random places: `[count, side, side, 3]` uint8."""
    whole, random = load_sample_image("china.jpg"), np.random.RandomState(seed)
    places = random.randint(0, 330, (count, 2))
    return np.stack([whole[y : y + side, x : x + side] for y, x in places])


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_cifar10(folder):
    files = {"cifar-10-batches-bin/readme.html": b"x"}
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*CIFAR10, "", ""]).encode()
    labels = np.random.RandomState(0).randint(0, 10, N_TRAIN + N_TEST).astype(np.uint8)
    images = photographs(N_TRAIN + N_TEST, 32, 0)
    rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(-1, 3072)], 1)
    for number in range(5):
        part = rows[number * 4 : number * 4 + 4]
        files[f"cifar-10-batches-bin/data_batch_{number + 1}.bin"] = part.tobytes()
    files["cifar-10-batches-bin/test_batch.bin"] = rows[N_TRAIN:].tobytes()
    tar(folder / "cifar-10-binary.tar.gz", files)
    return CIFAR10


def write_cifar100(folder):
    fine, coarse = ([f"{kind}_{i}" for i in range(n)] for kind, n in (("fine", 100), ("group", 20)))
    labels = np.random.RandomState(0).randint(0, 100, N_TRAIN + N_TEST).astype(np.uint8)
    images = photographs(N_TRAIN + N_TEST, 32, 0).transpose(0, 3, 1, 2).reshape(-1, 3072)
    rows = np.concatenate([labels[:, None] // 5, labels[:, None], images], 1)
    files = {
        "cifar-100-binary/coarse_label_names.txt": "\n".join([*coarse, ""]).encode(),
        "cifar-100-binary/fine_label_names.txt": "\n".join([*fine, ""]).encode(),
        "cifar-100-binary/test.bin": rows[N_TRAIN:].tobytes(),
        "cifar-100-binary/train.bin": rows[:N_TRAIN].tobytes(),
    }
    tar(folder / "cifar-100-binary.tar.gz", files)
    return fine


def write_svhn(folder):
    for split, count in (("train", N_TRAIN), ("test", N_TEST)):
        labels = np.random.RandomState(count).randint(1, 11, (count, 1)).astype(np.uint8)
        assert (labels == 10).any()  # the digit 0
        images = np.ascontiguousarray(np.moveaxis(photographs(count, 32, count), 0, -1))
        scipy_io.savemat(folder / f"{split}_32x32.mat", {"X": images, "y": labels})
    return list("0123456789")


def write_stl10(folder):
    files = {"stl10_binary/class_names.txt": "\n".join([*STL10, ""]).encode()}
    for split, count in (("test", N_TEST), ("train", N_TRAIN)):
        labels = np.random.RandomState(count).randint(1, 11, count).astype(np.uint8)
        planes = photographs(count, 96, count).transpose(0, 3, 2, 1)
        files[f"stl10_binary/{split}_X.bin"] = planes.tobytes()
        files[f"stl10_binary/{split}_y.bin"] = labels.tobytes()
    files["stl10_binary/unlabeled_X.bin"] = b"not wanted"
    tar(folder / "stl10_binary.tar.gz", files)
    return STL10


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn_cropped": write_svhn,
    "stl10": write_stl10,
}


def tfds_reads(name, folder, split, monkeypatch):
    """The examples by their keys that TFDS's own builder reads, `open` in place of TensorFlow's."""
    unpacked = folder / "unpacked"
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as files:
            files.extractall(unpacked, filter="data")
    builder_class = tfds.builder_cls(name)
    module = importlib.import_module(builder_class.__module__)
    gfile = SimpleNamespace(gfile=SimpleNamespace(GFile=open))
    monkeypatch.setattr(module, "tf", SimpleNamespace(io=gfile))
    found = {path.name: path for path in [*unpacked.rglob("*"), *folder.iterdir()]}
    arguments = {
        "cifar10": {
            "train": ("train_", [found.get(f"data_batch_{i}.bin") for i in range(1, 6)]),
            "test": ("test_", [found.get("test_batch.bin")]),
        },
        "cifar100": {s: (f"{s}_", [found.get(f"{s}.bin")]) for s in ("train", "test")},
        "svhn_cropped": {s: (f"{s}_", found.get(f"{s}_32x32.mat")) for s in ("train", "test")},
        "stl10": {
            s: ([found.get(f"{s}_X.bin"), found.get(f"{s}_y.bin")],) for s in ("train", "test")
        },
    }[name][split]
    builder = builder_class(data_dir=folder / "elsewhere")
    return dict(builder._generate_examples(*arguments))


def example_row(example):
    """Everything that is in an example, as something that can be sorted."""
    label = {k: int(v) for k, v in example.items() if "label" in k}
    name = example.get("id", b"")
    name = name.decode() if isinstance(name, bytes) else name
    pixels = hashlib.sha256(np.asarray(example["image"]).tobytes()).hexdigest()
    return name, sorted(label.items()), pixels


@pytest.fixture
def any_checksum(monkeypatch):
    from tensorflow_datasets.core.download import download_manager

    manager = download_manager.DownloadManager
    monkeypatch.setattr(manager, "_register_or_validate_checksums", lambda *args, **kwargs: None)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("any_checksum")
def test_archive_is_read_as_tfds_reads_it(name, tmp_path, monkeypatch):
    archives = tmp_path / "archives"
    archives.mkdir()
    class_names = WRITERS[name](archives)
    path = prepare.prepare(name, tmp_path / "data", archives)
    assert path.parent == tmp_path / "data" / name
    assert {p.name for p in (tmp_path / "data").iterdir()} == {name}
    prepared = tfds.data_source(name, data_dir=tmp_path / "data", download=False)
    assert set(prepared) == {"train", "test"}
    for split, count in (("train", N_TRAIN), ("test", N_TEST)):
        expected = tfds_reads(name, archives, split, monkeypatch)
        assert list(expected) == list(range(count))
        found = prepared[split].__getitems__(range(count))
        assert sorted(map(example_row, found)) == sorted(map(example_row, expected.values()))
    source = open_source(
        "tfds",
        "test",
        name=name,
        directory=str(tmp_path / "data"),
        load_size=32,
        channels=3,
        memory_limit_gb=1.0,
    )
    assert list(source.class_names) == class_names and source.size == N_TEST


def test_keys_are_those_of_tfds(tmp_path, monkeypatch):
    """TFDS orders what it writes by them."""
    write_cifar10(tmp_path)
    _, splits = prepare.KNOWN["cifar10"].read({"x": tmp_path / "cifar-10-binary.tar.gz"})
    ours = dict(prepare._examples(splits["train"]))
    theirs = tfds_reads("cifar10", tmp_path, "train", monkeypatch)
    assert [(key, row["id"]) for key, row in ours.items()] == [
        (key, row["id"]) for key, row in theirs.items()
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_source_files_are_registered_with_their_checksums(name):
    known = tfds.builder_cls(name).url_infos
    checksums = {**tfds.core.download.checksums.get_all_url_infos(), **(known or {})}
    infos = [checksums[url] for url in prepare.KNOWN[name].urls]
    assert [info.filename for info in infos] == list(prepare.KNOWN[name].files)
    assert round(sum(info.size for info in infos) / 1e6) == prepare.KNOWN[name].megabytes


@pytest.mark.parametrize("name", WRITERS)
def test_archive_with_another_checksum_is_refused(name, tmp_path):
    WRITERS[name](tmp_path)
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.prepare(name, tmp_path / "data", tmp_path)
    file, _, rest = str(caught.value).partition(" is not the original: ")
    assert file in prepare.KNOWN[name].files
    assert rest == "its SHA-256 is not the one TFDS knows; get it again"
    assert not list((tmp_path / "data").glob(f"{name}/[0-9]*"))


def test_missing_archive_says_where_it_is(tmp_path):
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.prepare("svhn_cropped", tmp_path / "data", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} lacks train_32x32.mat, test_32x32.mat: get "
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat and "
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat, and without --from_dir they are "
        "downloaded"
    )


@pytest.mark.usefixtures("any_checksum")
def test_archive_without_what_it_should_hold_is_refused(tmp_path):
    tar(tmp_path / "cifar-100-binary.tar.gz", {"cifar-100-binary/train.bin": b""})
    with pytest.raises(
        prepare.PrepareError, match=r"lacks test\.bin, coarse_label_names.txt, fine_"
    ):
        prepare.prepare("cifar100", tmp_path / "data", tmp_path)


def test_help_lists_the_data_sets(capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, known in prepare.KNOWN.items():
        assert f"{name} ({known.megabytes} MB)" in text


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
