"""Decoding and cropping against Pillow, NumPy and the crops that are made on the device."""

import io
import itertools
import math
import struct
import zlib
from functools import cache, partial

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from scipy import stats
from sklearn.datasets import load_sample_image

from supcon_jax.data import augment, decode

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZE = 40  # of the crops; more than half a side of the photograph, so that none is decoded smaller
WHOLE = np.array([0.0, 0.0, 0.0, 0.0])  # the draws that take the top left of what there is
OPENCV_ERROR = 0.51  # it rounds: half a level
PILLOW_ERROR = 1.01  # it cuts off the fraction


@cache
def photograph(width=96, height=64, name="flower.jpg"):
    return Image.fromarray(load_sample_image(name)).resize((width, height))


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def by_pillow(data):
    """`[height, width, 3]` as Pillow has it, upright."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def with_colours(pixels):
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, -1)


def bilinear(pixels, box, size):
    """The equation in float64: the four pixels around each place, weighted; edges repeated."""
    pixels = with_colours(np.asarray(pixels, np.float64))

    def around(start, length, limit):
        at = np.clip(start + (np.arange(size) + 0.5) * (length / size) - 0.5, 0, limit - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, limit - 1), at - low

    top, bottom, down = around(box[0], box[2], pixels.shape[0])
    left, right, across = around(box[1], box[3], pixels.shape[1])
    across = across[:, None]
    above = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    below = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return above * (1 - down[:, None, None]) + below * down[:, None, None]


def crops(data, draws, size=SIZE, channels=3, area=AREA, ratio=RATIO):
    options = dict(size=size, channels=channels, area=area, ratio=ratio)
    found = decode.random_crops("it", data, np.atleast_2d(draws), **options)
    assert all(crop.shape == (size, size, channels) for crop in found)
    assert all(crop.dtype == np.uint8 for crop in found)
    return np.stack(found)


@pytest.fixture
def opencv():
    return pytest.importorskip("cv2")


@pytest.fixture
def only_opencv(opencv, monkeypatch):
    """What is not for OpenCV fails."""

    def refuse(data):
        raise AssertionError("this was to be decoded by OpenCV")

    monkeypatch.setattr(decode, "_open_with_pillow", refuse)


@pytest.fixture(params=["opencv", "pillow"])
def tolerance(request, monkeypatch):
    """Every test that takes it runs with OpenCV and as if that were not installed."""
    if request.param == "pillow":
        monkeypatch.setattr(decode, "opencv", lambda: None)
        return PILLOW_ERROR
    pytest.importorskip("cv2")
    return OPENCV_ERROR


# Who decodes what.

JPEGS = [
    dict(quality=quality, subsampling=subsampling, progressive=progressive, **more)
    for quality, subsampling, progressive in itertools.product(
        (30, 75, 92, 100), ("4:4:4", "4:2:2", "4:2:0"), (False, True)
    )
    for more in ({},)
] + [dict(restart_marker_blocks=3), dict(optimize=True), dict(comment=b"\xff\xd8 a comment")]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_by_opencv_to_the_same_pixels(only_opencv, mode):
    for options, size in itertools.product(JPEGS, [(96, 64), (37, 51), (1, 1), (8, 200)]):
        data = encoded(photograph(*size).convert(mode), **options)
        pixels = decode.open_picture(data).pixels(1)
        assert pixels.ndim == (3 if mode == "RGB" else 2)
        np.testing.assert_array_equal(with_colours(pixels), by_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pngs_are_decoded_by_opencv_to_the_same_pixels(only_opencv, mode):
    image = photograph().convert(mode)
    harmless = PngImagePlugin.PngInfo()
    harmless.add(b"gAMA", struct.pack(">I", 45455))
    harmless.add(b"sRGB", b"\x00")
    harmless.add(b"pHYs", struct.pack(">IIB", 2835, 2835, 1))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({}, {"pnginfo": harmless}, {"icc_profile": profile}, {"compress_level": 0}):
        pixels = decode.open_picture(encoded(image, "PNG", **options)).pixels(1)
        np.testing.assert_array_equal(pixels, np.asarray(image))


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def text_of(**entries):
    info = PngImagePlugin.PngInfo()
    for name, value in entries.items():
        info.add_text(name, value)
    return info


def sixteen_bit():
    return Image.fromarray(np.asarray(photograph().convert("L")).astype(np.uint16) * 257)


FOR_PILLOW = {
    "cmyk jpeg": lambda: encoded(photograph().convert("CMYK")),
    "cmyk tiff": lambda: encoded(photograph().convert("CMYK"), "TIFF"),
    "palette": lambda: encoded(photograph().quantize(20), "PNG"),
    "palette, transparent": lambda: encoded(photograph().quantize(20), "PNG", transparency=2),
    "transparent grey": lambda: encoded(photograph().convert("L"), "PNG", transparency=70),
    "transparent colour": lambda: encoded(photograph(), "PNG", transparency=(9, 9, 9)),
    "grey and alpha": lambda: encoded(photograph().convert("LA"), "PNG"),
    "rgba": lambda: encoded(photograph().convert("RGBA"), "PNG"),
    "1 bit": lambda: encoded(photograph().convert("1"), "PNG"),
    "text in a png": lambda: encoded(photograph(), "PNG", pnginfo=text_of(Author="me")),
    "animated png": lambda: encoded(
        photograph(), "PNG", save_all=True, append_images=[photograph(name="china.jpg")]
    ),
    "gif": lambda: encoded(photograph(), "GIF"),
    "bmp": lambda: encoded(photograph(), "BMP"),
    "tiff": lambda: encoded(photograph(), "TIFF"),
    "webp": lambda: encoded(photograph(), "WEBP", lossless=True),
    "ppm": lambda: encoded(photograph(), "PPM"),
    "jpeg 2000": lambda: encoded(photograph(), "JPEG2000"),
}


@pytest.mark.parametrize("make", FOR_PILLOW.values(), ids=FOR_PILLOW)
def test_the_rest_is_decoded_by_pillow(make, opencv, monkeypatch):
    monkeypatch.setattr(opencv, "imdecode", None)
    data = make()
    pixels = decode.open_picture(data).pixels(1)
    np.testing.assert_array_equal(with_colours(pixels), by_pillow(data))
    box = decode.random_crop_box(WHOLE, *pixels.shape[:2], area=(1, 1), ratio=(1.5, 1.5))
    found = crops(data, WHOLE, area=(1, 1), ratio=(1.5, 1.5))[0]
    np.testing.assert_allclose(found, bilinear(by_pillow(data), box, SIZE), atol=OPENCV_ERROR)


def test_16_bit_images_keep_their_greys(tolerance):
    found = crops(encoded(sixteen_bit(), "PNG"), WHOLE, area=(1, 1), ratio=(1.5, 1.5))[0]
    expected = bilinear(photograph().convert("L"), (0, 0, 64, 96), SIZE)
    np.testing.assert_allclose(found, expected, atol=tolerance)


# Crops.


def boxes_of(height, width, count, seed=0, area=AREA, ratio=RATIO):
    draws = np.random.RandomState(seed).random_sample((count, 4))
    box = partial(decode.random_crop_box, height=height, width=width, area=area, ratio=ratio)
    return draws, np.array([box(u) for u in draws])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [1, 7, 24, 130])
def test_crop_is_bilinear_interpolation_at_the_box(tolerance, mode, size):
    for width, height in ((96, 64), (33, 90), (2, 1), (1, 1)):
        pixels = np.asarray(photograph(width, height).convert(mode))
        _, boxes = boxes_of(height, width, 10)
        for box in [*boxes, (0, 0, height, width)]:
            found = decode.resized_crop(pixels, tuple(box), size)
            assert found.shape == (size, size, *pixels.shape[2:])
            expected = bilinear(pixels, box, size)
            np.testing.assert_allclose(with_colours(found), expected, atol=tolerance)


@pytest.mark.parametrize("name", ["flower.jpg", "china.jpg"])
def test_crop_is_the_one_made_on_the_device(tolerance, name):
    image = photograph(name=name)
    data = encoded(image, "PNG")
    keys = jax.random.split(jax.random.key(3), 40)
    on_device = jax.jit(
        jax.vmap(partial(augment.random_resized_crop, size=SIZE, area=AREA, ratio=RATIO), (0, None))
    )(keys, jax.numpy.asarray(image, jax.numpy.float32) / 255)
    draws = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys))
    found = crops(data, draws).astype(float)
    np.testing.assert_allclose(found, 255 * np.asarray(on_device), atol=tolerance + 0.02)


def test_image_is_decoded_once_for_all_views(opencv, monkeypatch):
    data, (draws, _), calls = encoded(photograph()), boxes_of(64, 96, 5), []
    alone = [crops(data, one)[0] for one in draws]
    whole = opencv.imdecode
    monkeypatch.setattr(opencv, "imdecode", lambda *args: calls.append(1) or whole(*args))
    np.testing.assert_array_equal(crops(data, draws), alone)
    assert len(calls) == 1


def test_boxes_have_the_distribution_that_is_promised():
    height, width = 300, 400
    _, boxes = boxes_of(height, width, 4000, area=(0.1, 0.3))
    top, left, tall, wide = boxes.T
    uniform = {
        "share": (tall * wide / (height * width) - 0.1) / 0.2,
        "log ratio": np.log(wide / tall * 4 / 3) / (2 * math.log(4 / 3)),
        "top": top / (height - tall),
        "left": left / (width - wide),
    }
    for name, values in uniform.items():
        assert stats.kstest(values, "uniform").pvalue > 1e-3, name
    for one, other in itertools.combinations(uniform, 2):
        assert abs(np.corrcoef(uniform[one], uniform[other])[0, 1]) < 0.06, (one, other)


def test_boxes_stay_in_the_image():
    for height, width in ((10, 400), (400, 10), (50, 50)):
        _, boxes = boxes_of(height, width, 500)
        top, left, tall, wide = boxes.T
        assert (boxes[:, :2] >= 0).all() and (tall > 0).all() and (wide > 0).all()
        assert (top + tall <= height + 1e-9).all() and (left + wide <= width + 1e-9).all()
        assert (np.isclose(tall, height) & (tall * wide < 0.9 * height * width)).any() or (
            height >= width
        )


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_and_colour_become_what_is_asked_for(tolerance, form):
    draws, _ = boxes_of(64, 96, 6)
    colour, grey = (encoded(photograph().convert(mode), form) for mode in ("RGB", "L"))
    as_rgb = crops(colour, draws)
    expected = [np.asarray(Image.fromarray(crop).convert("L")) for crop in as_rgb]
    np.testing.assert_array_equal(crops(colour, draws, channels=1)[..., 0], expected)
    of_grey = crops(grey, draws)
    assert (of_grey == of_grey[..., :1]).all() and of_grey.std() > 20
    np.testing.assert_array_equal(crops(grey, draws, channels=1), of_grey[..., :1])


# Turned pictures.

TURNS = [
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turned_pictures_are_cropped_upright(tolerance, orientation, form):
    turn = TURNS[orientation - 1]
    stored = photograph() if turn is None else photograph().transpose(turn)
    data = encoded(stored, form, exif=exif_of(orientation))
    upright = by_pillow(data)
    assert upright.shape == (64, 96, 3)
    assert np.abs(upright - np.asarray(photograph(), float)).mean() < 6
    draws, boxes = boxes_of(64, 96, 4)
    for found, box in zip(crops(data, draws), boxes, strict=True):
        np.testing.assert_allclose(found, bilinear(upright, box, SIZE), atol=tolerance)
    square = decode.middle_square("it", data, size=40, channels=3)
    middle = ImageOps.fit(Image.fromarray(upright), (40, 40), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(square, middle)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_impossible_orientation_is_ignored(orientation):
    data = encoded(photograph(), exif=exif_of(orientation))
    np.testing.assert_array_equal(decode.open_picture(data).pixels(1), by_pillow(data))
    draws, _ = boxes_of(64, 96, 2)
    np.testing.assert_array_equal(crops(data, draws), crops(encoded(photograph()), draws))


# Decoding at a part of the size.


def reduced(data, divisor):
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // divisor, image.height // divisor))
    return np.asarray(image)


@pytest.mark.parametrize(
    ("size", "divisor"), [(51, 1), (49, 2), (26, 2), (24, 4), (13, 4), (12, 8), (5, 8)]
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_large_jpegs_are_decoded_at_a_part_of_their_size(tolerance, size, divisor, orientation):
    """A crop of 100 x 150 pixels, of which the whole is no multiple of 8."""
    data = encoded(photograph(317, 229, "china.jpg"), exif=exif_of(orientation))
    height, width = by_pillow(data).shape[:2]
    share, ratio = 100 * 150 / (height * width), 1.5
    draws = np.array([0.0, 0.0, 0.3, 0.6])
    found = crops(data, draws, size=size, area=(share, share), ratio=(ratio, ratio))[0]
    top, left, tall, wide = 0.3 * (height - 100), 0.6 * (width - 150), 100, 150
    bottom, right = height - top - tall, width - left - wide
    stored, quarters = {
        1: ((top, left, tall, wide), 0),
        3: ((bottom, right, tall, wide), 2),
        6: ((right, top, wide, tall), 3),
    }[orientation]
    expected = bilinear(reduced(data, divisor), [x / divisor for x in stored], size)
    np.testing.assert_allclose(found, np.rot90(expected, quarters), atol=tolerance)


def test_smallest_view_decides_how_small_the_decoding_may_be(tolerance):
    data = encoded(photograph(320, 240))
    draws = np.array([[0.0, 0.5, 0.2, 0.2], [1.0, 0.5, 0.2, 0.2]])
    options = dict(size=40, area=(0.05, 0.9), ratio=(1.0, 1.0))
    together, alone = crops(data, draws, **options), crops(data, draws[1], **options)
    np.testing.assert_array_equal(together[0], crops(data, draws[0], **options)[0])
    box = decode.random_crop_box(draws[1], 240, 320, area=(0.05, 0.9), ratio=(1.0, 1.0))
    whole = bilinear(by_pillow(data), box, 40)
    np.testing.assert_allclose(together[1], whole, atol=tolerance)
    assert np.abs(alone[0] - whole).max() > 3


def test_decoding_smaller_loses_no_quality():
    """Nearer to the mean of the pixels that a result's pixel covers than plain interpolation."""
    image = photograph(600, 400, "china.jpg")
    data = encoded(image, quality=95)
    options = dict(area=(0.95, 1.0), ratio=(1.5, 1.5))
    for size in (25, 48, 97, 190):
        draws, boxes = boxes_of(400, 600, 8, **options)
        for found, (top, left, tall, wide) in zip(
            crops(data, draws, size, **options), boxes, strict=True
        ):
            where = (left, top, left + wide, top + tall)
            mean = np.asarray(image.resize((size, size), Image.Resampling.BOX, box=where), float)
            error = np.square(found - mean).mean()
            plain = np.square(
                bilinear(by_pillow(data), (top, left, tall, wide), size) - mean
            ).mean()
            assert error < 0.8 * plain


def test_png_is_decoded_whole():
    data = encoded(photograph(320, 240), "PNG")
    found = crops(data, WHOLE, size=20, area=(1, 1), ratio=(4 / 3, 4 / 3))[0]
    expected = bilinear(photograph(320, 240), (0, 0, 240, 320), 20)
    np.testing.assert_allclose(found, expected, atol=OPENCV_ERROR)


# Damaged files.

PNG_OF_NOTHING = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I4sI", 0, kind, zlib.crc32(kind)) for kind in (b"IHDR", b"IEND")
)


def outcome(data, **options):
    """All crops, or the error."""
    try:
        return crops(data, boxes_of(64, 96, 2)[0], **options)
    except decode.DecodeError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow, of TIFF
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_cut_off_files_are_refused(tolerance, form):
    """Pillow decodes some that lack but a few bytes; then it is the picture."""
    data = encoded(photograph(), form)
    whole = crops(data, boxes_of(64, 96, 2)[0])
    for keep in [0, 1, 2, 3, 5, 10, 20, *np.linspace(24, len(data) - 1, 25).astype(int)]:
        found = outcome(data[:keep])
        if isinstance(found, str):
            assert found.startswith("cannot decode it: ") and found.endswith("repair or remove it")
        else:
            assert keep > len(data) - 30
            np.testing.assert_array_equal(found, whole)


def test_opencv_is_not_asked_for_a_jpeg_without_an_end(opencv, monkeypatch):
    """OpenCV 4 makes up what is missing."""
    data, asked = encoded(photograph()), []
    monkeypatch.setattr(opencv, "imdecode", lambda *_: asked.append(1))
    for keep in np.linspace(24, len(data) - 1, 25).astype(int):
        outcome(data[:keep])
    assert not asked


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", PNG_OF_NOTHING]
)
def test_what_is_no_image_is_refused(tolerance, data):
    with pytest.raises(decode.DecodeError, match=r"^cannot decode it: .*; repair or remove it$"):
        crops(data, WHOLE)
    with pytest.raises(decode.DecodeError, match=r"^cannot decode it: .*; repair or remove it$"):
        decode.middle_square("it", data, size=8, channels=3)


def with_byte(data, place, value):
    """A byte changed, and the sum that a PNG has of its header made right again."""
    changed = data[:place] + bytes([value]) + data[place + 1 :]
    if changed[1:4] == b"PNG":
        changed = changed[:29] + struct.pack(">I", zlib.crc32(changed[12:29])) + changed[33:]
    return changed


@pytest.mark.parametrize(("form", "least"), [("JPEG", 200), ("PNG", 20)])
def test_damaged_headers_never_lead_to_other_pixels_than_pillows(opencv, monkeypatch, form, least):
    """Where Pillow decodes a file with a wrong byte, the result is the same."""
    data, random, decoded = encoded(photograph(48, 32), form), np.random.RandomState(0), 0
    for place, _ in itertools.product(range(160 if form == "JPEG" else 60), range(3)):
        damaged = with_byte(data, place, random.randint(256))
        found = outcome(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "opencv", lambda: None)
            expected = outcome(damaged)
        if not isinstance(expected, str):
            decoded += 1
            assert not isinstance(found, str), found
            np.testing.assert_allclose(found, expected, atol=1, rtol=0)
    assert decoded > least


def test_missing_file_is_named(tmp_path):
    with pytest.raises(decode.DecodeError, match=r"^cannot decode gone: .*No such file"):
        decode.middle_square("gone", tmp_path / "x.jpg", size=8, channels=3)


def test_images_beyond_pillows_limit_are_refused_as_pillow_does(monkeypatch):
    data = encoded(photograph())  # from a larger file
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(decode.DecodeError, match="decompression bomb"):
        crops(data, WHOLE)


def test_files_and_bytes_are_the_same(tmp_path):
    data = encoded(photograph())
    (tmp_path / "x").write_bytes(data)
    draws, _ = boxes_of(64, 96, 3)
    np.testing.assert_array_equal(crops(tmp_path / "x", draws), crops(data, draws))


def test_opencv_that_is_too_old_is_not_used(opencv, monkeypatch):
    monkeypatch.delattr(opencv, "IMREAD_COLOR_RGB")
    decode.opencv.cache_clear()
    try:
        assert decode.opencv() is None
    finally:
        decode.opencv.cache_clear()


def test_cores_that_were_not_lent_are_not_used(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert decode.usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    assert decode.usable_cores() == 64
