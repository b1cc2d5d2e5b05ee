"""Sources on real images: digits, photographs in all formats, archives, TFDS; and their errors."""

import functools
import itertools
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_tfds
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split

from supcon_jax.data import sources

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = PIXELS.reshape(-1, 8, 8)


def read(source, split, directory="", **options):
    settings = dict(name="", load_size=8, channels=1, memory_limit_gb=1.0)
    return sources.open_source(source, split, directory=str(directory), **{**settings, **options})


read_digits = partial(read, "digits")
read_folder = partial(read, "folder")
read_tfds = partial(read, "tfds", name="tiny_digits")


def everything(source):
    images, labels = source.load(np.arange(source.size))
    assert images.shape == (source.size, *source.image_shape) and images.dtype == np.uint8
    assert labels.shape == (source.size,) and labels.dtype == np.int32
    return images, labels


def photograph(name="flower.jpg", width=96, height=64):
    return Image.fromarray(load_sample_image(name)).resize((width, height))


def middle(image, size):
    """Pillow's resize of the middle square, written out."""
    width, height = image.size
    side = min(image.size)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def digit(number):
    return Image.fromarray((PIXELS[number] * 15).astype(np.uint8))


@pytest.fixture
def digit_folder(tmp_path):
    """Eight digits in `train/{even,odd}` and four in `test`, at their own size."""
    for number in range(12):
        split = "train" if number < 8 else "test"
        save(digit(number), tmp_path / split / ("even", "odd")[number % 2] / f"{number:02}.png")
    return tmp_path


# Digits.


def numbers_of(source):
    """Which of scikit-learn's digits a source has: all 1797 are different."""
    known = {pixels.astype(np.uint8).tobytes(): i for i, pixels in enumerate(PIXELS)}
    images, labels = everything(source)
    original = np.round(images[..., 0] * (16 / 255)).astype(np.uint8)
    np.testing.assert_array_equal(np.round(original * (255 / 16)), images[..., 0])
    numbers = np.array([known[pixels.tobytes()] for pixels in original])
    np.testing.assert_array_equal(labels, LABELS[numbers])
    return numbers


def test_digits_are_split_in_two_once_and_for_all():
    train, test = numbers_of(read_digits("train")), numbers_of(read_digits("test"))
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train, *test]) == list(range(1797))
    expected = train_test_split(np.arange(1797), test_size=0.2, random_state=0, stratify=LABELS)
    np.testing.assert_array_equal(train, expected[0])
    np.testing.assert_array_equal(test, expected[1])
    assert train[:6].tolist() == [1346, 295, 257, 385, 1640, 849]
    assert test[:6].tolist() == [1496, 188, 705, 820, 413, 744]


def test_digits_splits_are_stratified():
    for split, share in (("train", 0.8), ("test", 0.2)):
        counts = np.bincount(LABELS[numbers_of(read_digits(split))], minlength=10)
        np.testing.assert_allclose(counts, share * np.bincount(LABELS), atol=1)


def test_digits_in_file_order():
    np.testing.assert_array_equal(numbers_of(read_digits("first1437")), np.arange(1437))
    np.testing.assert_array_equal(numbers_of(read_digits("last360")), np.arange(1437, 1797))


def test_digits_are_enlarged_to_the_load_size_and_coloured():
    source = read_digits("last360", load_size=20, channels=3)
    assert source.image_shape == (20, 20, 3)
    assert source.class_names == tuple("0123456789")
    images, _ = everything(source)
    eight_bit = np.round(PIXELS[1437:] * (255 / 16)).astype(np.uint8)
    for image, pixels in zip(images[:50], eight_bit, strict=False):
        np.testing.assert_array_equal(image[..., 0], middle(Image.fromarray(pixels), 20))
        np.testing.assert_array_equal(image, np.repeat(image[..., :1], 3, axis=-1))


def test_unknown_digits_split_is_refused_with_those_there():
    with pytest.raises(FileNotFoundError) as caught:
        read_digits("validation")
    assert str(caught.value) == (
        "digits has the splits train, test, first1437, last360, not 'validation'"
    )


# Image folders.


def test_folder_has_the_images_in_order_of_class_and_name(digit_folder):
    train, test = read_folder("train", digit_folder), read_folder("test", digit_folder)
    assert train.class_names == test.class_names == ("even", "odd")
    assert (train.size, test.size) == (8, 4)
    images, labels = everything(train)
    np.testing.assert_array_equal(labels, [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(images[..., 0], 15 * PIXELS[[0, 2, 4, 6, 1, 3, 5, 7]])
    images, labels = train.load(np.array([7, 0, 7]))
    np.testing.assert_array_equal(labels, [1, 0, 1])
    np.testing.assert_array_equal(images[..., 0], 15 * PIXELS[[7, 0, 7]])


def test_classes_are_in_alphabetical_order(tmp_path):
    for number, name in enumerate(["b", "a10", "C", "a9"]):
        save(digit(number), tmp_path / "train" / name / "x.png")
    source = read_folder("train", tmp_path)
    assert source.class_names == ("C", "a10", "a9", "b")
    np.testing.assert_array_equal(everything(source)[0][..., 0], 15 * PIXELS[[2, 1, 3, 0]])


def test_images_may_be_in_folders_of_a_class_and_hidden_files_are_left_out(digit_folder):
    save(digit(20), digit_folder / "train" / "odd" / "more" / "a.png")
    (digit_folder / "train" / "odd" / ".DS_Store").write_bytes(b"\x00\x01")
    (digit_folder / "train" / "README.txt").write_text("about the classes")
    source = read_folder("train", digit_folder)
    assert source.size == 9
    assert (everything(source)[0][..., 0] == 15 * PIXELS[20]).all(axis=(1, 2)).sum() == 1


def test_hidden_folders_are_no_classes(digit_folder):
    """Jupyter leaves such ones behind wherever a file is opened."""
    save(digit(0), digit_folder / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
    source = read_folder("train", digit_folder)
    assert source.class_names == ("even", "odd") and source.size == 8


def test_class_folders_may_be_links(digit_folder, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("even", "odd"):
        (tmp_path / "linked" / name).symlink_to(digit_folder / "train" / name)
    linked = everything(read_folder("linked", tmp_path))
    for found, expected in zip(linked, everything(read_folder("train", tmp_path)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_decoded_in_memory_and_one_by_one_are_the_same(digit_folder):
    for number in range(5):
        save(photograph(width=90 + number), digit_folder / "train" / "odd" / f"p{number}.jpg")
    options = dict(load_size=24, channels=3)
    memory = read_folder("train", digit_folder, **options)
    lazy = read_folder("train", digit_folder, memory_limit_gb=0.0, **options)
    for kept, decoded in zip(everything(memory), everything(lazy), strict=True):
        np.testing.assert_array_equal(kept, decoded)
    shutil.rmtree(digit_folder / "train")
    assert everything(memory)[0].any()
    with pytest.raises(ValueError, match="No such file"):
        lazy.load(np.array([3]))


def test_memory_limit_is_in_gigabytes_of_the_split(digit_folder):
    needed = 8 * 20 * 20 * 3 / 1e9
    for share, kept in ((1.0, True), (0.99, False)):
        options = dict(load_size=20, channels=3, memory_limit_gb=share * needed)
        source = read_folder("train", digit_folder, **options)
        first, second = source.load(np.array([0])), source.load(np.array([0]))
        np.testing.assert_array_equal(first[0], second[0])
        (digit_folder / "train/even/00.png").rename(digit_folder / "moved")
        if kept:
            source.load(np.array([0]))
        else:
            with pytest.raises(ValueError, match="cannot decode"):
                source.load(np.array([0]))
        (digit_folder / "moved").rename(digit_folder / "train/even/00.png")


FORMATS = {
    "png": ("RGB", ".png", {}),
    "jpeg": ("RGB", ".jpg", {}),
    "upper-case": ("RGB", ".JPEG", {}),
    "grey jpeg": ("L", ".jpg", {}),
    "grey png": ("L", ".png", {}),
    "grey and alpha": ("LA", ".png", {}),
    "rgba": ("RGBA", ".png", {}),
    "cmyk": ("CMYK", ".jpg", {}),
    "palette": ("P", ".png", {}),
    "palette with transparent colour": ("P", ".png", {"transparency": 3}),
    "gif": ("P", ".gif", {}),
    "1 bit": ("1", ".png", {}),
    "bmp": ("RGB", ".bmp", {}),
    "tiff": ("RGB", ".tif", {}),
    "webp": ("RGB", ".webp", {"lossless": True}),
    "no extension": ("RGB", "", {"format": "PNG"}),
}


@pytest.mark.parametrize(("mode", "extension", "options"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(tmp_path, mode, extension, options, channels):
    """Against Pillow's own decoding; that it is still the photograph to what the format keeps."""
    path = save(photograph().convert(mode), tmp_path / "train" / "a" / f"x{extension}", **options)
    images, _ = everything(read_folder("train", tmp_path, load_size=40, channels=channels))
    with Image.open(path) as image:
        expected = middle(image.convert("RGB"), 40)
    wanted_mode = "RGB" if channels == 3 else "L"
    expected = np.asarray(Image.fromarray(expected).convert(wanted_mode)).reshape(40, 40, -1)
    np.testing.assert_array_equal(images[0], expected)
    original = Image.fromarray(middle(photograph().convert("RGB"), 40)).convert(
        "RGB" if channels == 3 and mode not in ("L", "LA", "1") else "L"
    )
    difference = images[0].astype(float) - np.asarray(original).reshape(40, 40, -1)
    assert np.abs(difference).mean() < (30 if mode == "1" else 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "L", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_the_load_size_is_only_converted(tmp_path, mode, channels):
    extension = ".jpg" if mode == "CMYK" else ".png"
    image = photograph(width=32, height=32).convert(mode)
    path = save(image, tmp_path / "train" / "a" / f"x{extension}")
    images, _ = everything(read_folder("train", tmp_path, load_size=32, channels=channels))
    with Image.open(path) as saved:
        expected = np.asarray(saved.convert("RGB" if channels == 3 else "L"))
    np.testing.assert_array_equal(images[0], expected.reshape(32, 32, channels))


@pytest.mark.parametrize("load_size", [32, 40])
@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_16_bit_images_keep_their_greys(tmp_path, load_size, extension):
    grey = np.asarray(photograph(width=40, height=40).convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    save(wide, tmp_path / "train" / "a" / f"x{extension}")
    images, _ = everything(read_folder("train", tmp_path, load_size=load_size))
    np.testing.assert_allclose(images[0, ..., 0], middle(Image.fromarray(grey), load_size), atol=2)


def test_palette_with_many_transparent_colours_is_read_without_a_warning(tmp_path):
    image = photograph(width=32, height=32).quantize(16)
    path = tmp_path / "train" / "a" / "x.png"
    save(image, path, transparency=bytes([0, 128] + [255] * 14))
    images, _ = everything(read_folder("train", tmp_path, load_size=32, channels=3))
    np.testing.assert_array_equal(images[0], image.convert("RGB"))


TURNS = {  # EXIF orientation -> how the camera stored an upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_pictures_stand_upright_whatever_way_the_camera_was_held(tmp_path, orientation, extension):
    upright, exif = photograph(), Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    path = save(stored, tmp_path / "train" / "a" / f"x{extension}", exif=exif)
    with Image.open(path) as saved:
        assert saved.getexif()[0x0112] == orientation
    images, _ = everything(read_folder("train", tmp_path, load_size=48, channels=3))
    difference = np.abs(images[0].astype(float) - middle(upright, 48))
    assert difference.max() == 0 if extension == ".png" else difference.mean() < 6


def test_sizes_may_differ(tmp_path):
    """The short side is scaled to the load size, and the middle is cut out."""
    sizes = [(96, 64), (64, 96), (20, 20), (33, 150), (151, 32), (8, 7), (48, 48)]
    for number, size in enumerate(sizes):
        save(photograph("china.jpg", *size), tmp_path / "train" / "a" / f"{number}.png")
    images, _ = everything(read_folder("train", tmp_path, load_size=48, channels=3))
    for image, size in zip(images, sizes, strict=True):
        np.testing.assert_array_equal(image, middle(photograph("china.jpg", *size), 48))


# What is wrong with a folder.


def test_missing_folder_is_named_with_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_folder("train", tmp_path / "nowhere")
    message = str(caught.value)
    assert message.startswith(
        f"no image folder {tmp_path}/nowhere/train: expected {tmp_path}/nowhere/SPLIT/CLASS/IMAGE"
    )
    assert "--config.data.dir" in message and "found" not in message


def test_directory_that_was_not_set_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(digit(0), tmp_path / "train" / "a" / "x.png")
    with pytest.raises(FileNotFoundError, match=r"set --config\.data\.dir"):
        read_folder("train", "")


def test_missing_split_is_refused_with_those_there(digit_folder):
    with pytest.raises(FileNotFoundError) as caught:
        read_folder("val", digit_folder)
    message = str(caught.value)
    assert message.startswith(f"no image folder {digit_folder}/val")
    assert "found the splits test, train" in message
    assert "--config.data.train_split" in message and "--config.data.test_split" in message


def test_empty_class_folder_is_named(digit_folder):
    (digit_folder / "train" / "zero").mkdir()
    with pytest.raises(ValueError, match="no images") as caught:
        read_folder("train", digit_folder)
    assert str(caught.value) == (
        f"class folder {digit_folder}/train/zero has no images: add some or remove it"
    )


def test_split_without_class_folders_is_refused(tmp_path):
    save(digit(0), tmp_path / "train" / "0.png")
    with pytest.raises(ValueError, match="no class folders") as caught:
        read_folder("train", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/train has no class folders: expected {tmp_path}/SPLIT/CLASS/IMAGE"
    )


def truncated(extension, keep):
    """A photograph whose file ends too early: `keep` is a share, or a number of bytes."""

    def write(path):
        save(photograph(), path.with_suffix(extension))
        whole = path.with_suffix(extension).read_bytes()
        path.with_suffix(extension).unlink()
        path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])

    return write


SHORT_PNG_HEADER = b"\x89PNG\r\n\x1a\n" + struct.pack(
    ">I8sI", 4, b"IHDR" + bytes(4), zlib.crc32(b"IHDR" + bytes(4))
)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("not an image"),
        lambda path: path.write_bytes(b""),
        truncated(".jpg", 0.5),
        truncated(".jpg", 0.01),
        truncated(".png", 0.5),
        truncated(".gif", 0.5),
        truncated(".webp", 0.5),
        truncated(".png", 20),
        lambda path: path.write_bytes(SHORT_PNG_HEADER),
        lambda path: path.write_bytes(b"P5 8 x8 255\n" + bytes(64)),
    ],
    ids=[
        "text",
        "empty",
        "half jpeg",
        "jpeg header",
        "half png",
        "half gif",
        "half webp",
        "png header",
        "damaged png",
        "wrong pgm",
    ],
)
@pytest.mark.parametrize("memory_limit_gb", [0.0, 1.0], ids=["lazy", "in memory"])
def test_undecodable_image_is_named(digit_folder, write, memory_limit_gb):
    bad = digit_folder / "train" / "odd" / "bad.jpg"
    write(bad)
    with pytest.raises(ValueError, match="bad") as caught:
        everything(read_folder("train", digit_folder, memory_limit_gb=memory_limit_gb))
    message = str(caught.value)
    assert message.startswith(f"cannot decode {bad}: ")
    assert message.endswith("; repair or remove it")


def test_source_without_images_is_refused(monkeypatch):
    empty = sources.Source("nothing/train", 0, ("a",), (8, 8, 1), lambda i: None, lambda: None)
    monkeypatch.setitem(sources.SOURCES, "nothing", lambda split, **_: empty)
    with pytest.raises(ValueError, match=r"^nothing/train has no images$"):
        read("nothing", "train")


def test_source_of_other_images_than_asked_for_is_refused(monkeypatch):
    images = np.zeros((3, 10, 10, 1), np.uint8)
    source = sources.from_arrays("mine/train", images, np.zeros(3, int), ("a",))
    monkeypatch.setitem(sources.SOURCES, "mine", lambda split, **_: source)
    assert read("mine", "train", load_size=10).size == 3
    message = r"^mine/train has images of shape \(10, 10, 1\), asked for are \(8, 8, 1\): set"
    with pytest.raises(ValueError, match=message):
        read("mine", "train", load_size=8)


# Arrays.


def test_source_of_arrays():
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    source = sources.from_arrays("mine", images, np.array([1, 0, 1, 1, 0]), ["no", "yes"])
    assert source.class_names == ("no", "yes") and source.image_shape == (2, 2, 3)
    np.testing.assert_array_equal(everything(source)[0], images)
    found, labels = source.load(np.array([4, 0, 0]))
    np.testing.assert_array_equal(found, images[[4, 0, 0]])
    np.testing.assert_array_equal(labels, [0, 1, 1])
    np.testing.assert_array_equal(source.labels(), [1, 0, 1, 1, 0])
    part = sources.subset(source, np.array([2, 4]), "part")
    np.testing.assert_array_equal(everything(part)[0], images[[2, 4]])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), [0, 1, 0],
         r"^images of mine must be \[n, height, width, channels\] uint8, got \[3, 8, 8\] uint8$"),
        (np.zeros((3, 8, 8, 1)), [0, 1, 0], r"uint8, got \[3, 8, 8, 1\] float64$"),
        (np.zeros((3, 8, 8, 1), np.uint8), [0, 1],
         r"^labels of mine must be \[3\] integers, got \[2\] int64$"),
        (np.zeros((3, 8, 8, 1), np.uint8), [0, 1, 0.5], r"integers, got \[3\] float64$"),
        (np.zeros((3, 8, 8, 1), np.uint8), [0, 2, 1],
         "^mine: image 1 has label 2, expected 0 to 1$"),
        (np.zeros((3, 8, 8, 1), np.uint8), [0, 1, -1], "^mine: image 2 has label -1, expected"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        sources.from_arrays("mine", images, np.array(labels), ("a", "b"))


# TFDS.


def rows(images, labels):
    """Each image with its label, in any order: TFDS shuffles what it writes."""
    return Counter((image.tobytes(), int(y)) for image, y in zip(images, labels, strict=True))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    tiny_tfds.prepare_digits(folder, n_train=40, n_test=20)
    return folder


@pytest.fixture
def prepared(tfds_dir, tmp_path):
    """A copy to break: the folder of the data set's version, and its root."""
    shutil.copytree(tfds_dir, tmp_path / "tfds")
    return tmp_path / "tfds" / "tiny_digits" / "1.0.0"


def root_of(prepared):
    return prepared.parents[1]


def edit(prepared, **changes):
    info = prepared / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), **changes}))


@pytest.mark.parametrize("memory_limit_gb", [0.0, 1.0], ids=["lazy", "in memory"])
def test_tfds_has_the_images_and_labels(tfds_dir, memory_limit_gb):
    for split, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        source = read_tfds(split, tfds_dir, memory_limit_gb=memory_limit_gb)
        assert source.class_names == tuple("0123456789")
        images, labels = everything(source)
        expected = (PIXELS[part] * 15).astype(np.uint8)[..., None]
        assert rows(images, labels) == rows(expected, LABELS[part])
        again = source.load(np.array([7, 3, 7]))
        np.testing.assert_array_equal(again[0], images[[7, 3, 7]])
        np.testing.assert_array_equal(again[1], labels[[7, 3, 7]])


def test_tfds_images_are_fitted_like_those_of_a_folder(tfds_dir):
    small, _ = everything(read_tfds("test", tfds_dir))
    large, _ = everything(read_tfds("test", tfds_dir, load_size=20, channels=3))
    for image, pixels in zip(large, small[..., 0], strict=True):
        np.testing.assert_array_equal(image[..., 1], middle(Image.fromarray(pixels), 20))


def test_tfds_is_found_through_its_environment_variable(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert read_tfds("test").size == 20


def test_unknown_tfds_split_is_refused_with_those_there(tfds_dir):
    with pytest.raises(FileNotFoundError) as caught:
        read_tfds("validation", tfds_dir)
    assert str(caught.value) == (
        f"tiny_digits in {tfds_dir}/tiny_digits/1.0.0 has the splits train, test, not 'validation'"
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fashion_mnist", "python -m supcon_jax.data.prepare fashion_mnist --data_dir {}"),
        ("cifar100", "python -m supcon_jax.data.prepare cifar100 --data_dir {}"),
        ("mnist", "tfds build mnist --file_format=array_record --data_dir={}"),
    ],
)
def test_missing_tfds_data_set_says_how_to_get_it(tmp_path, name, command):
    with pytest.raises(FileNotFoundError) as caught:
        read_tfds("train", tmp_path, name=name)
    message = str(caught.value)
    assert message.startswith(f"data set {name!r} is not in {tmp_path}. Prepare it: ")
    assert command.format(tmp_path) in message
    assert "--config.data.dir" in message and "--config.data.source=folder" in message


def test_tfds_without_a_name_is_refused(tfds_dir):
    with pytest.raises((FileNotFoundError, ValueError), match=r"data\.name"):
        read_tfds("train", tfds_dir, name="")


@pytest.mark.parametrize("form", ["tfrecord", "riegeli", None])
def test_tfds_format_that_needs_tensorflow_is_refused(prepared, form):
    edit(prepared, fileFormat=form)
    if form is None:  # as older versions of TFDS wrote tfrecord
        info = json.loads((prepared / "dataset_info.json").read_text())
        del info["fileFormat"]
        (prepared / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="TensorFlow") as caught:
        read_tfds("train", root_of(prepared))
    assert str(caught.value) == (
        f"{prepared} is stored as {form or 'tfrecord'}, which only TensorFlow reads; convert it: "
        f"tfds convert_format --dataset_dir={prepared} --out_file_format=array_record"
    )


def test_newest_tfds_version_is_taken(prepared):
    for version in ("1.9.0", "1.10.0", "0.11.0"):
        shutil.copytree(prepared, prepared.parent / version)
    assert sources.find_tfds("tiny_digits", str(root_of(prepared))).name == "1.10.0"


@pytest.mark.parametrize("memory_limit_gb", [0.0, 1.0], ids=["lazy", "in memory"])
def test_label_out_of_range_is_named(prepared, memory_limit_gb):
    """The data set says that it has nine classes, and has ten."""
    (prepared / "label.labels.txt").write_text("\n".join("012345678"))
    with pytest.raises(ValueError, match="label") as caught:
        everything(read_tfds("train", root_of(prepared), memory_limit_gb=memory_limit_gb))
    shutil.rmtree(prepared.parent)
    tiny_tfds.prepare_digits(root_of(prepared), n_train=40, n_test=20)
    _, labels = everything(read_tfds("train", root_of(prepared)))
    first = np.flatnonzero(labels == 9)[0]
    assert str(caught.value) == (f"tiny_digits/train: record {first} has label 9, expected 0 to 8")


def test_undecodable_tfds_record_is_named(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    whole, count = tiny_tfds._png, itertools.count()

    def sometimes_broken(image):
        file = whole(image)
        if next(count) == 3:
            file.truncate(60)
        return file

    monkeypatch.setattr(tiny_tfds, "_png", sometimes_broken)
    tiny_tfds.prepare_digits(tmp_path, n_train=10, n_test=5)
    with pytest.raises(ValueError, match=r"^cannot decode tiny_digits/train record \d: .*; rep"):
        read_tfds("train", tmp_path)


def test_fashion_mnist():
    """Published means: 0.2860 and 0.2868; https://github.com/zalandoresearch/fashion-mnist."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "fashion_mnist").is_dir():
        pytest.skip(f"no fashion_mnist in {folder}: python -m supcon_jax.data.prepare")
    source = read_tfds("test", folder, name="fashion_mnist", load_size=28)
    assert source.class_names[:3] == ("T-shirt/top", "Trouser", "Pullover")
    images, labels = everything(source)
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 1000))
    assert abs(images.mean() / 255 - 0.2868) < 1e-4


# Images that cannot be decoded, left out.


@pytest.fixture
def with_bad(tmp_path):
    """130 images that are as bright as their numbers, but four that are text; not in memory."""
    for number in range(130):
        file = tmp_path / "train" / "ab"[number // 65] / f"{number:03}.png"
        save(Image.new("L", (8, 8), number), file)
        if number in (3, 70, 71, 128):
            file.write_text("not an image")
    return read_folder("train", tmp_path, memory_limit_gb=0.0)


def test_images_that_cannot_be_decoded_are_left_out(with_bad):
    said = []
    good = sources.decodable(with_bad, of=400, warn=said.append)
    images, labels = everything(good)
    expected = np.delete(np.arange(130), [3, 70, 71, 128])
    np.testing.assert_array_equal(images[:, 0, 0, 0], expected)
    np.testing.assert_array_equal(labels, expected // 65)
    assert good.read is not None and good.class_names == with_bad.class_names
    (line,) = said
    start = f"{with_bad.name}: 4 of 130 images cannot be decoded and are left out: cannot decode "
    assert line.startswith(f"{start}{with_bad.name}/a/003.png: ") and line.endswith("; and 1 more")
    assert [f"{number:03}.png" in line for number in (70, 71, 128)] == [True, True, False]


def test_sources_without_such_images_stay_as_they_are(with_bad):
    part = sources.subset(with_bad, np.arange(4, 60), "part")
    for source in (part, sources.in_memory(part), sources.subset(part, np.arange(0), "none")):
        assert sources.decodable(source, of=1, warn=pytest.fail) is source


def test_more_than_one_per_cent_are_not_left_out(with_bad):
    message = r"^4 images cannot be decoded, more than 1% of 399; the last: cannot .*128\.png: "
    with pytest.raises(ValueError, match=message):
        sources.decodable(with_bad, of=399, warn=pytest.fail)


# Parts of a source.


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_hold_out_is_fixed_disjoint_and_whole(fraction):
    source = read_digits("first1437")
    rest, held = sources.hold_out(source, fraction)
    assert held.size == round(fraction * 1437) and rest.size + held.size == 1437
    numbers = [numbers_of(part) if part.size else np.array([], int) for part in (rest, held)]
    assert sorted([*numbers[0], *numbers[1]]) == list(range(1437))
    assert all((np.diff(part) > 0).all() for part in numbers)  # in the order of the source
    again = sources.hold_out(read_digits("first1437"), fraction)
    if fraction:
        np.testing.assert_array_equal(numbers_of(again[1]), numbers[1])
    assert (rest.name, held.name) == ("digits/first1437", "digits/first1437 (held out)")
    assert rest.class_names == held.class_names == source.class_names


def test_hold_out_never_changes():
    held = sources.hold_out(read_digits("first1437"), 0.05)[1]
    assert numbers_of(held)[:6].tolist() == [4, 31, 34, 52, 54, 107]


@pytest.mark.parametrize("memory_limit_gb", [0.0, 1.0], ids=["lazy", "in memory"])
def test_joined_sources_have_the_images_of_one_after_the_other(digit_folder, memory_limit_gb):
    parts = [
        read_folder(split, digit_folder, memory_limit_gb=memory_limit_gb)
        for split in ("train", "test")
    ]
    joined = sources.join(*parts, "both")
    assert (joined.name, joined.size, joined.class_names) == ("both", 12, ("even", "odd"))
    expected = [np.concatenate(both) for both in zip(*map(everything, parts), strict=True)]
    order = np.array([11, 0, 8, 7, 3, 3])  # of both parts, in any order
    for found, whole in zip(joined.load(order), expected, strict=True):
        np.testing.assert_array_equal(found, whole[order])
    np.testing.assert_array_equal(joined.labels(), expected[1])
    images, _ = joined.load(np.array([1, 2]))  # of one part alone
    np.testing.assert_array_equal(images, expected[0][1:3])
    assert (joined.read is None) == (memory_limit_gb > 0)
    if joined.read is not None:
        found = [(Path(row.where).stem, row.label) for row in joined.read(order)]
        assert found == [("11", 1), ("00", 0), ("08", 0), ("07", 1), ("06", 0), ("06", 0)]


def test_split_names(digit_folder, tfds_dir):
    names = partial(sources.split_names, name="tiny_digits")
    assert names("folder", directory=str(digit_folder)) == ("test", "train")
    assert names("folder", directory="nowhere") == ()
    assert sorted(names("tfds", directory=str(tfds_dir))) == ["test", "train"]
    for split in names("digits", directory=""):
        assert read_digits(split).size


def test_subset_loads_the_images_chosen(digit_folder):
    for limit in (0.0, 1.0):
        whole = read_folder("train", digit_folder, memory_limit_gb=limit)
        part = sources.subset(whole, np.array([6, 1, 4]), "some")
        assert (part.name, part.size, part.class_names) == ("some", 3, ("even", "odd"))
        images, labels = part.load(np.array([2, 0]))
        np.testing.assert_array_equal(labels, [1, 1])
        np.testing.assert_array_equal(images[..., 0], 15 * PIXELS[[1, 5]])
        inner = sources.subset(part, np.array([1]), "one")
        np.testing.assert_array_equal(inner.load(np.array([0]))[0][0, ..., 0], 15 * PIXELS[2])


# Real archives.


@functools.cache
def first_images(archive, folder, classes, of_each):
    """`{path: bytes}` of the first images of the first classes, without unpacking the rest."""
    place = os.environ.get("SUPCON_JAX_DATA")
    data = Path(place) if place else Path(__file__).parents[3] / "shared" / "data"
    if not (data / archive).is_file():
        pytest.skip(f"no {archive} in {data}: set SUPCON_JAX_DATA to where it is")
    found, counts = {}, Counter()
    with tarfile.open(data / archive, "r|xz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or "/".join(parts[:2]) != folder:
                continue
            counts[parts[2]] += 1
            if counts[parts[2]] <= of_each:
                found["/".join(parts[1:])] = tar.extractfile(member).read()
            if len(counts) == classes and counts[parts[2]] == of_each:
                return found
    raise AssertionError(f"{archive} has too few images in {folder}")


@pytest.fixture
def unpack(tmp_path):
    def write(*arguments):
        for path, content in first_images(*arguments).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        return tmp_path

    return write


@pytest.mark.parametrize("memory_limit_gb", [0.0, 1.0], ids=["lazy", "in memory"])
@pytest.mark.parametrize(
    ("archive", "split", "size", "names"),
    [
        ("cifar10", "test", 32, ("airplane", "automobile")),
        ("imagenette160", "train", 96, ("n01440764", "n02102040")),
    ],
)
def test_real_folder(archive, split, size, names, memory_limit_gb, unpack):
    folder = unpack(f"{archive}.tar.xz", f"{archive}/{split}", 2, 10)
    options = dict(load_size=size, channels=3, memory_limit_gb=memory_limit_gb)
    source = read_folder(split, folder, **options)
    assert source.class_names == names
    images, labels = everything(source)
    np.testing.assert_array_equal(labels, np.repeat([0, 1], 10))
    for image, path in zip(images, sorted(folder.glob(f"{split}/*/*")), strict=True):
        with Image.open(path) as decoded:
            np.testing.assert_array_equal(image, middle(decoded.convert("RGB"), size))
