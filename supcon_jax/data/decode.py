"""From a file or its bytes to pixels: the middle square, or random crops made while decoding.

OpenCV decodes plain 8-bit JPEG and PNG, Pillow all the rest, and everything where OpenCV (4.11 or
newer) is missing. Both bring libjpeg-turbo and give the same pixels: no difference in the files of
`experiments/benchmarks/input.json`, nor in the qualities and formats of the tests.
"""

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

CHANNEL_MODES = {1: "L", 3: "RGB"}
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # upright = stored, transposed (or not), then its rows, its columns reversed (or not)
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
SHRINKS = (8, 4, 2, 1)  # what a JPEG can be divided by for less work than decoding it whole
TABLES = (0xC4, 0xDB, 0xDD, 0xFE)  # JPEG segments before the size, beside the applications' own
HARMLESS = frozenset((b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"sBIT"))  # in a PNG

Box = tuple[float, float, float, float]  # top, left, height, width in pixels, not rounded


class DecodeError(ValueError):
    """An image that cannot be decoded; the message names it."""


def usable_cores() -> int:
    """CPU cores this process may use: a scheduler or container may lend fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Picture(NamedTuple):
    """An image whose header has been read.

    Attributes:
      height: in pixels, as it is stored.
      width: likewise.
      orientation: EXIF's, 1 to 8: how it is to be turned.
      shrinks: whether it can be decoded at a half, a quarter or an eighth of its size.
      pixels: `divisor -> [ceil(height / divisor), ceil(width / divisor)]`, with a third axis of 3
        for colours, uint8, as it is stored.
    """

    height: int
    width: int
    orientation: int
    shrinks: bool
    pixels: Callable[[int], np.ndarray]


def middle_square(where: str, image: Path | bytes, *, size: int, channels: int) -> np.ndarray:
    """Scale the short side of an image to `size` and cut out the middle square.

    Args:
      where: name for messages.
      image: file, or its bytes.
      size: side of the result in pixels.
      channels: 1 (grey) or 3 (RGB).

    Returns:
      `[size, size, channels]` uint8.

    Raises:
      DecodeError: it cannot be decoded.
    """
    with _naming(where):
        picture = open_picture(image)
        upright = _turn(picture.pixels(1), picture.orientation)
        return fit(Image.fromarray(upright), size=size, channels=channels)


def fit(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
    """The middle square of a grey or RGB image, `[size, size, channels]`, bilinear."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.convert(CHANNEL_MODES[channels])).reshape(size, size, channels)


def random_crops(
    where: str,
    image: Path | bytes,
    draws: np.ndarray,
    *,
    size: int,
    channels: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> list[np.ndarray]:
    """Random parts of an image, each resized to a square; the image is decoded once.

    The same as `augment.random_resized_crop` on the device, value for value after rounding: plain
    bilinear interpolation, as in the authors' code, at a real-valued box. Only where all crops are
    at least 2, 4 or 8 times larger than the result, a JPEG is decoded at so much smaller a size,
    which averages the pixels that interpolation would jump over.

    Args:
      where: name for messages.
      image: file, or its bytes.
      draws: `[views, 4]` uniform in [0, 1): share of the area, ratio, top, left.
      size: side of the results in pixels.
      channels: 1 (grey) or 3 (RGB).
      area: smallest and largest share of the area.
      ratio: smallest and largest width / height.

    Returns:
      One `[size, size, channels]` uint8 a view.

    Raises:
      DecodeError: it cannot be decoded.
    """
    with _naming(where):
        picture = open_picture(image)
        transposed = TURNS[picture.orientation][0]
        height, width = picture[:2] if not transposed else picture[1::-1]
        boxes = [random_crop_box(u, height, width, area=area, ratio=ratio) for u in draws]
        stored = [_as_stored(box, height, width, picture.orientation) for box in boxes]
        shrink = _shrink(stored, size) if picture.shrinks else 1
        pixels = picture.pixels(shrink)
    crops = [resized_crop(pixels, box, size, shrink=shrink) for box in stored]
    return [_with_channels(_turn(crop, picture.orientation), channels) for crop in crops]


def random_crop_box(
    draws: Sequence[float] | np.ndarray,
    height: int,
    width: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A part with a uniform share of the area and a log-uniform ratio, at a uniform place.

    Sides longer than the image's are cut to it. The same box as `augment.random_resized_crop`
    takes for the same draws.

    Args:
      draws: `[4]` uniform in [0, 1): share of the area, ratio, top, left.
      height: of the image in pixels.
      width: likewise.
      area: smallest and largest share of the area.
      ratio: smallest and largest width / height.

    Returns:
      Top, left, height and width in pixels, real numbers.

    References:
      Szegedy et al., 2014, https://arxiv.org/abs/1409.4842, section 6.
    """
    share, log_ratio, down, right = (float(draw) for draw in draws)
    pixels = (area[0] + share * (area[1] - area[0])) * height * width
    shortest, longest = math.log(ratio[0]), math.log(ratio[1])
    wide = math.exp(shortest + log_ratio * (longest - shortest))
    crop_height = min(math.sqrt(pixels / wide), height)
    crop_width = min(math.sqrt(pixels * wide), width)
    return down * (height - crop_height), right * (width - crop_width), crop_height, crop_width


def resized_crop(pixels: np.ndarray, box: Box, size: int, shrink: int = 1) -> np.ndarray:
    """A part of an image resized to a square by bilinear interpolation, pixel centres at .5.

    Args:
      pixels: `[height, width]` or `[height, width, 3]` uint8.
      box: top, left, height and width of the part, real numbers, in pixels of the whole image.
      size: side of the result in pixels.
      shrink: by which `pixels` is smaller than the whole image.

    Returns:
      `[size, size]` or `[size, size, 3]` uint8. OpenCV 5 rounds the exact value; Pillow cuts off
      its fraction.
    """
    top, left, height, width = (length / shrink for length in box)
    y, x = height / size, width / size  # steps between the result's pixels
    cv2 = opencv()
    if cv2 is None:
        affine = (x, 0.0, left, 0.0, y, top)
        image = Image.fromarray(pixels)
        how: dict[str, Any] = {"resample": Image.Resampling.BILINEAR}
        return np.asarray(image.transform((size, size), Image.Transform.AFFINE, affine, **how))
    rows, columns = _touched(top, y, size), _touched(left, x, size)
    part = pixels[rows, columns]
    matrix = np.array(
        [
            [x, 0.0, left + 0.5 * x - 0.5 - columns.start],
            [0.0, y, top + 0.5 * y - 0.5 - rows.start],
        ]
    )
    colours = pixels.ndim == 3
    if colours:  # four channels are twice as fast as three
        part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)
    crop = cv2.warpAffine(
        part,
        matrix,
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cv2.cvtColor(crop, cv2.COLOR_RGBA2RGB) if colours else crop


def _touched(start: float, step: float, size: int) -> slice:
    """The pixels along one axis between which the result's are interpolated."""
    first = start + 0.5 * step - 0.5
    return slice(max(0, math.floor(first)), math.floor(first + (size - 1) * step) + 2)


def open_picture(image: Path | bytes) -> Picture:
    """Read the header of an image, and find who decodes it."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    header = _header(data)
    if header is None or opencv() is None:
        return _open_with_pillow(data)
    height, width, colours, jpeg, exif = header
    orientation = _orientation(Image.open(io.BytesIO(data))) if exif else 1
    pixels = partial(_decode_with_opencv, data, colours)
    return Picture(height, width, orientation, jpeg, pixels)


class _Header(NamedTuple):
    height: int
    width: int
    colours: bool
    jpeg: bool
    exif: bool  # there may be an orientation


def _header(data: bytes) -> _Header | None:
    """What a plain 8-bit JPEG or PNG says of itself; None for all others."""
    found = None
    if data.startswith(b"\xff\xd8\xff"):
        found = _jpeg_header(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        found = _png_header(data)
    limit = Image.MAX_IMAGE_PIXELS or math.inf  # beyond it Pillow warns or refuses
    if found is None or not 0 < found.height * found.width <= limit:
        return None
    return found


def _jpeg_header(data: bytes) -> _Header | None:
    """Of a baseline or progressive JPEG, grey or in three colours, that has an end."""
    place, exif = 2, False
    while data[place : place + 1] == b"\xff" and len(data) >= place + 10:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1, 0xC2):
            precision, colours = data[place + 4], data[place + 9]
            height, width = (
                _number(data[place + 5 : place + 7]),
                _number(data[place + 7 : place + 9]),
            )
            whole = data.rfind(b"\xff\xd9", place) > 0  # else OpenCV 4 makes up what is missing
            plain = precision == 8 and colours in (1, 3) and whole
            return _Header(height, width, colours == 3, True, exif) if plain else None
        if marker not in TABLES and marker >> 4 != 0xE:
            return None
        exif |= marker == 0xE1
        place += 2 + _number(data[place + 2 : place + 4])
    return None


def _png_header(data: bytes) -> _Header | None:
    """Of an 8-bit grey or RGB PNG without anything that changes how it is shown."""
    place, kind = 8, data[12:16]
    if kind != b"IHDR":
        return None
    while kind != b"IEND":
        kind = data[place + 4 : place + 8]
        if kind not in (b"IHDR", b"IDAT", b"IEND") and kind not in HARMLESS:
            return None
        place += 12 + _number(data[place : place + 4])
    height, width = _number(data[20:24]), _number(data[16:20])
    depth, colours = data[24], data[25]
    if depth != 8 or colours not in (0, 2):
        return None
    return _Header(height, width, colours == 2, False, False)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _decode_with_opencv(data: bytes, colours: bool, shrink: int) -> np.ndarray:
    cv2 = opencv()
    assert cv2 is not None
    flags = cv2.IMREAD_COLOR_RGB if colours else cv2.IMREAD_GRAYSCALE
    if shrink > 1:
        flags |= getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{shrink}")
    encoded = np.frombuffer(data, np.uint8)
    try:
        pixels = cv2.imdecode(encoded, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    # What OpenCV refuses, Pillow may read, or says what is wrong with it.
    return _open_with_pillow(data).pixels(shrink) if pixels is None else pixels


def _open_with_pillow(data: bytes) -> Picture:
    image = Image.open(io.BytesIO(data))
    if image.format in ("JPEG", "MPO"):
        pixels = partial(_decode_jpeg_with_pillow, data)
        return Picture(image.height, image.width, _orientation(image), True, pixels)
    upright = np.asarray(_grey_or_rgb(ImageOps.exif_transpose(image)))
    return Picture(upright.shape[0], upright.shape[1], 1, False, lambda _: upright)


def _decode_jpeg_with_pillow(data: bytes, shrink: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // shrink, image.height // shrink))
    return np.asarray(_grey_or_rgb(image))


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's conversion would clip it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(ORIENTATION, 1)
    return found if found in TURNS else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """From as it is stored to upright."""
    transposed, rows, columns = TURNS[orientation]
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def _as_stored(box: Box, height: int, width: int, orientation: int) -> Box:
    """A box in the upright image of this height and width, as a box in the stored one."""
    transposed, rows, columns = TURNS[orientation]
    top, left, box_height, box_width = box
    top = height - top - box_height if rows else top
    left = width - left - box_width if columns else left
    return (left, top, box_width, box_height) if transposed else (top, left, box_height, box_width)


def _shrink(boxes: Sequence[Box], size: int) -> int:
    """The largest divisor that leaves each side of each box at least `size` pixels."""
    smallest = min(min(box[2:]) for box in boxes)
    return next((shrink for shrink in SHRINKS if smallest >= shrink * size), 1)


def _with_channels(crop: np.ndarray, channels: int) -> np.ndarray:
    if crop.ndim == 2:
        return np.broadcast_to(crop[..., None], (*crop.shape, channels))
    if channels == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(crop)).convert("L"))[..., None]
    return crop


@cache
def opencv() -> ModuleType | None:
    """OpenCV, where it is installed and can decode to RGB."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2 if hasattr(cv2, "IMREAD_COLOR_RGB") else None


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is in no image format that Pillow knows" if unknown else error
        raise DecodeError(f"cannot decode {where}: {reason}; repair or remove it") from None
