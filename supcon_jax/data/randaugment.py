"""AutoAugment and RandAugment: operations on 8-bit images, as Pillow does them.

What an operation does is in numbers, an `Operation`, of one of five kinds. Under `vmap`,
`lax.switch` computes all its branches: the five kinds cost little, 16 operations would cost much.
On the CPU the examples go one by one instead, see `augment.one_by_one`.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from supcon_jax.data import augment

Image = Float[Array, "height width channels"]
Pixels = UInt8[Array, "height width channels"]
Tables = Float[Array, "channels 256"]
PRNGKey = Key[Array, ""]
Number = float | np.ndarray | Array
Histogram = Callable[[Pixels], Int[Array, "channels 256"]]

LEVELS = np.arange(256, dtype=np.float32)
FILL = 128  # what comes from outside of the image, and what a hole is filled with
NOTHING, AFFINE, TABLE, COLOR, SHARPNESS = range(5)  # kinds
FIXED, EQUALIZE, AUTOCONTRAST, CONTRAST = range(4)  # tables; all but the fixed depend on the image


class Operation(NamedTuple):
    """What is done, in numbers (or arrays of them, one an operation); only the kind's are read."""

    kind: Number = NOTHING
    angle: Number = 0.0  # anticlockwise, in degrees
    shear_x: Number = 0.0  # columns to the left a row
    shear_y: Number = 0.0  # rows upwards a column
    shift_x: Number = 0.0  # to the left, a share of the width
    shift_y: Number = 0.0  # upwards, a share of the height
    hole: Number = 0.0  # half the side of a square, a share of the height
    which: Number = FIXED  # table
    table: np.ndarray | Array = LEVELS  # `[256]`, the fixed one: the new value of each
    factor: Number = 1.0  # of a blend: other + factor (pixel - other)


_affine = partial(Operation, AFFINE)


def _table(values: np.ndarray) -> Operation:
    return Operation(TABLE, table=np.floor(np.clip(values, 0, 255)))


def _depending(which: int, factor: float = 1.0) -> Operation:
    return Operation(TABLE, which=which, factor=factor)


# From the argument (see `rand_arguments`) to the operation.
OPERATIONS: dict[str, Callable[[float], Operation]] = {
    "Identity": lambda _: Operation(),
    "AutoContrast": lambda _: _depending(AUTOCONTRAST),
    "Equalize": lambda _: _depending(EQUALIZE),
    "Invert": lambda _: _table(255 - LEVELS),
    "Rotate": lambda degrees: _affine(angle=degrees),
    "Posterize": lambda bits: _table(LEVELS - LEVELS % 2 ** (8 - bits)),
    "Solarize": lambda threshold: _table(np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)),
    "Color": lambda factor: Operation(COLOR, factor=factor),
    "Contrast": lambda factor: _depending(CONTRAST, factor),
    "Brightness": lambda factor: _table(np.float32(factor) * LEVELS),
    "Sharpness": lambda factor: Operation(SHARPNESS, factor=factor),
    "ShearX": lambda slope: _affine(shear_x=slope),
    "ShearY": lambda slope: _affine(shear_y=slope),
    "TranslateX": lambda share: _affine(shift_x=share),
    "TranslateY": lambda share: _affine(shift_y=share),
    "Cutout": lambda share: _affine(hole=share),
    "SolarizeAdd": lambda addition: _table(np.where(LEVELS < 128, LEVELS + addition, LEVELS)),
}


def rand_arguments(level: float, *, translate: float = 100.0) -> dict[str, float]:
    """The argument of each operation at a level from 0 to 10, in the authors' TensorFlow code.

    Args:
      level: 0 to 10.
      translate: pixels at level 10, in an image of 224.

    Returns:
      Degrees, shares of the side, factors, bits kept, and 8-bit thresholds, by name.

    References:
      https://github.com/tensorflow/models/blob/master/official/vision/ops/augment.py
    """
    share = level / 10
    return {
        "Rotate": 30 * share,
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * share),
        **dict.fromkeys(("TranslateX", "TranslateY"), translate / 224 * share),
        "Cutout": 40 / 224 * share,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.8 * share + 0.1),
        "Posterize": max(1, int(share * 4)),  # TensorFlow shifts 8 bits by 7 at most
        "Solarize": int(share * 256),
        "SolarizeAdd": int(share * 110),
    }


def imagenet_arguments(level: float) -> dict[str, float]:
    """As `rand_arguments`, but at level 10 a translation moves 250 of 224 pixels.

    So the published code, where the TranslateY of level 9 that is in the table leaves only grey.
    """
    return rand_arguments(level, translate=250.0)


def cifar_arguments(level: float) -> dict[str, float]:
    """The argument of each operation at a level from 0 to 9: ten steps of the paper's ranges.

    References:
      Cubuk et al., 2018, https://arxiv.org/abs/1805.09501, table 6.
    """
    share = level / 9
    return {
        "Rotate": 30 * share,
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * share),
        **dict.fromkeys(("TranslateX", "TranslateY"), 150 / 331 * share),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.8 * share + 0.1),
        "Posterize": 8 - round(4 * share),
        "Solarize": 256 - 256 * share,
    }


# (operation, probability, level) twice, for each sub-policy.
Table = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]
IMAGENET: Table = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
CIFAR: Table = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
    (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)
TABLES: dict[str, tuple[Table, Callable[[float], dict[str, float]]]] = {
    "imagenet": (IMAGENET, imagenet_arguments),
    "cifar": (CIFAR, cifar_arguments),
}
RAND_OPERATIONS = tuple(OPERATIONS)  # 16 and the identity


def auto_augment(key: PRNGKey, image: Image, *, table: str = "imagenet") -> Image:
    """One of 25 pairs of operations, each of the two with its own probability.

    Args:
      key: random key.
      image: `[height, width, channels]`, rounded to 8 bits; 1 or 3 channels.
      table: "imagenet" (the policy called v0) or "cifar".

    Returns:
      The shape of `image`, multiples of 1 / 255.

    Raises:
      ValueError: unknown table.

    References:
      Cubuk et al., 2018, https://arxiv.org/abs/1805.09501.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}; got {table!r}")
    pairs, arguments = TABLES[table]
    flat = [step for pair in pairs for step in pair]
    made = [OPERATIONS[name](arguments(level).get(name, 0)) for name, _, level in flat]
    operations = stack([*made, Operation()])
    probabilities = jnp.array([probability for _, probability, _ in flat])

    draws = jax.random.uniform(key, (9,), jnp.float32)
    chosen = 2 * jnp.int32(draws[0] * len(pairs)) + jnp.arange(2)
    draws = draws[1:].reshape(2, 4)
    applied = jnp.where(draws[:, 0] < probabilities[chosen], chosen, len(flat))
    return _sequence(image, operations, applied, draws[:, 1:])


def rand_augment(key: PRNGKey, image: Image, *, layers: int = 2, magnitude: float = 10.0) -> Image:
    """Operations drawn evenly from 16 and the identity, one after the other, all of one magnitude.

    Args:
      key: random key.
      image: `[height, width, channels]`, rounded to 8 bits; 1 or 3 channels.
      layers: how many operations.
      magnitude: 0 to 10, see `rand_arguments`. At 0 the geometric operations and SolarizeAdd do
        nothing, but Posterize leaves one bit of eight: it is no common strength.

    Returns:
      The shape of `image`, multiples of 1 / 255.

    References:
      Cubuk et al., 2019, https://arxiv.org/abs/1909.13719.
    """
    arguments = rand_arguments(magnitude)
    operations = stack(OPERATIONS[name](arguments.get(name, 0)) for name in RAND_OPERATIONS)
    draws = jax.random.uniform(key, (layers, 4), jnp.float32)
    chosen = jnp.int32(draws[:, 0] * len(RAND_OPERATIONS))
    return _sequence(image, operations, chosen, draws[:, 1:])


def stack(operations: Iterable[Operation]) -> Operation:
    """One `Operation` with arrays of all."""
    fields = zip(*operations, strict=True)
    return Operation(*(jnp.array(np.stack(field), jnp.float32) for field in fields))


def _sequence(
    image: Image,
    operations: Operation,
    chosen: Int[Array, " layers"],
    draws: Float[Array, "layers 3"],
) -> Image:
    """The chosen of the operations, each with a random sign and a hole at a random place."""
    pixels = jnp.round(255 * image).astype(jnp.uint8)
    signs = jnp.where(draws[:, 0] < 0.5, jnp.float32(-1), jnp.float32(1))
    centres = jnp.floor(draws[:, 1:] * jnp.array([image.shape[:2]]))
    each = jax.tree.map(lambda field: field[chosen], operations)

    def layer(pixels: Pixels, step: tuple[Operation, Array, Array]) -> tuple[Pixels, None]:
        return apply(pixels, *step), None

    pixels, _ = jax.lax.scan(layer, pixels, (each, signs, centres))
    return pixels.astype(jnp.float32) / 255


def apply(
    pixels: Pixels, operation: Operation, sign: Float[Array, ""], centre: Float[Array, "2"]
) -> Pixels:
    """One operation.

    Args:
      pixels: `[height, width, channels]` uint8; 1 or 3 channels.
      operation: what to do.
      sign: -1 turns the direction of an affine map round.
      centre: row and column of the pixel around which the hole is.

    Returns:
      The shape of `pixels`.
    """
    on_cpu, elsewhere = (
        partial(_apply, histogram=histogram)
        for histogram in (histogram_by_scatter, histogram_by_bits)
    )
    return augment.one_by_one(on_cpu, elsewhere)(pixels, operation, sign, centre)


def _apply(
    pixels: Pixels, operation: Operation, sign: Array, centre: Array, *, histogram: Histogram
) -> Pixels:
    def look_up(pixels: Pixels) -> Pixels:
        tables = _tables(pixels, operation, histogram)
        return (
            tables.reshape(-1).at[_places(pixels)].get(mode="promise_in_bounds").astype(jnp.uint8)
        )

    branches = (
        lambda pixels: pixels,
        lambda pixels: _map(pixels, operation, sign, centre),
        look_up,
        lambda pixels: _blend(pixels, _grey(pixels), operation.factor).astype(jnp.uint8),
        lambda pixels: _blend(pixels, _smooth(pixels), operation.factor).astype(jnp.uint8),
    )
    return jax.lax.switch(jnp.int32(operation.kind), branches, pixels)


def _map(pixels: Pixels, operation: Operation, sign: Array, centre: Array) -> Pixels:
    """To (x, y) comes the pixel in which A (x, y) + b is; x, y = column, row at pixel centres.

    As Pillow's `Image.transform` and `Image.rotate` (about the middle of the image) do.
    """
    height, width, channels = pixels.shape
    angle = sign * operation.angle * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = (jnp.arange(width) + 0.5)[None], (jnp.arange(height) + 0.5)[:, None]
    right, down = x - width / 2, y - height / 2  # of the middle
    moved_x = sign * (operation.shear_x * y + operation.shift_x * width)
    moved_y = sign * (operation.shear_y * x + operation.shift_y * height)
    column = jnp.floor(width / 2 + cos * right - sin * down + moved_x)
    row = jnp.floor(height / 2 + sin * right + cos * down + moved_y)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)

    half = jnp.floor(operation.hole * height + 1e-3)  # 40 / 224 of 224 is 40 in spite of rounding
    above = jnp.arange(height)[:, None] - centre[0]
    left = jnp.arange(width)[None] - centre[1]
    inside &= ~((-half <= above) & (above < half) & (-half <= left) & (left < half))
    place = jnp.where(inside, row * width + column, height * width).astype(jnp.int32)
    return pixels.reshape(-1, channels).at[place].get(mode="fill", fill_value=FILL)


def _tables(pixels: Pixels, operation: Operation, histogram: Histogram) -> Tables:
    """The new value of each, for each channel."""
    channels = pixels.shape[-1]
    branches = (
        lambda pixels: jnp.broadcast_to(operation.table, (channels, 256)),
        lambda pixels: equalizing(histogram(pixels)),
        lambda pixels: stretching(histogram(pixels)),
        lambda pixels: contrasting(pixels, operation.factor),
    )
    return jax.lax.switch(jnp.int32(operation.which), branches, pixels)


def equalizing(counts: Int[Array, "channels 256"]) -> Tables:
    """Tables that spread the values evenly: (half a step + pixels below) // step, as Pillow's.

    The step is the 255th part of the pixels below the highest value that occurs.
    """
    below = jnp.cumsum(counts, axis=-1) - counts
    step = below.max(-1, keepdims=True, where=counts > 0, initial=0) // 255
    spread = (step // 2 + below) // jnp.maximum(step, 1)
    return _or_unchanged(step > 0, jnp.minimum(spread, 255))


def stretching(counts: Int[Array, "channels 256"]) -> Tables:
    """Tables that send the lowest value that occurs to 0 and the highest to 255."""
    lowest = jnp.argmax(counts > 0, axis=-1, keepdims=True)
    highest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=-1, keepdims=True)
    above = jnp.maximum(jnp.arange(256)[None] - lowest, 0)
    spread = 255 * above // jnp.maximum(highest - lowest, 1)
    return _or_unchanged(highest > lowest, jnp.minimum(spread, 255))


def contrasting(pixels: Pixels, factor: Number) -> Tables:
    """Tables of the blend with the mean of the grey image.

    The published TensorFlow code has a slip here, which is not copied: its mean is the number of
    pixels over 256, 196 in an image of 224 x 224.
    """
    total = _grey(pixels).astype(jnp.int32).sum()
    count = pixels.shape[0] * pixels.shape[1]
    mean = (total + count // 2) // count
    return jnp.broadcast_to(_blend(jnp.arange(256), mean, factor), (pixels.shape[-1], 256))


def _places(pixels: Pixels) -> Int[Array, "height width channels"]:
    """Of the values in a table `[channels, 256]` laid flat."""
    return 256 * jnp.arange(pixels.shape[-1]).reshape(1, 1, -1) + pixels


def _or_unchanged(condition: Array, table: Array) -> Tables:
    return jnp.where(condition, table, jnp.arange(256)[None]).astype(jnp.float32)


def histogram_by_scatter(pixels: Pixels) -> Int[Array, "channels 256"]:
    """How often each value occurs in each channel: the fastest way for one image on a CPU."""
    channels = pixels.shape[-1]
    zeros = jnp.zeros(256 * channels, jnp.int32)
    counts = zeros.at[_places(pixels).reshape(-1)].add(1, mode="promise_in_bounds")
    return counts.reshape(channels, 256)


def histogram_by_bits(pixels: Pixels) -> Int[Array, "channels 256"]:
    """The same without a scatter, for many images on an accelerator.

    Bit k of 32 pixels makes a word. And-ing the words of four bits, or their complements, gives 16
    masks that tell in which pixels these bits have a given value; a count is the number of ones in
    a mask of the upper four and-ed with one of the lower four.
    """
    height, width, channels = pixels.shape
    count, words = height * width, -(-height * width // 32)
    padded = jnp.pad(pixels.reshape(count, channels), ((0, 32 * words - count), (0, 0)))
    grouped = padded.T.reshape(channels, words, 32).astype(jnp.uint32)
    bits = (grouped[:, None] >> jnp.arange(8, dtype=jnp.uint32).reshape(1, 8, 1, 1)) & 1
    places = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 1, 32)
    planes = (bits << places).sum(-1, dtype=jnp.uint32)
    values = jnp.arange(16, dtype=jnp.uint32).reshape(1, 16, 1)

    def masks(planes: Array) -> Array:
        flips = ((values >> k & 1) - 1 for k in range(4))  # no bit or all of them
        return reduce(jnp.bitwise_and, (planes[:, k, None] ^ x for k, x in enumerate(flips)))

    both = masks(planes[:, 4:])[:, :, None] & masks(planes[:, :4])[:, None]
    counts = jax.lax.population_count(both).astype(jnp.int32).sum(-1).reshape(channels, 256)
    return counts - (32 * words - count) * (jnp.arange(256) == 0)[None]


def _blend(values: Array, other: Array, factor: Number) -> Array:
    """other + factor (value - other), cut to 8 bits, and no integer lost to rounding."""
    return jnp.floor(jnp.clip(other + factor * (values - other) + 1e-4, 0, 255))


def _grey(pixels: Pixels) -> Float[Array, "height width 1"]:
    """ITU-R BT.601 in 16-bit fixed point, rounded, as Pillow's "L"."""
    if pixels.shape[-1] == 1:
        return pixels.astype(jnp.float32)
    red, green, blue = (pixels[..., c : c + 1].astype(jnp.int32) for c in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(jnp.float32)


def _smooth(pixels: Pixels) -> Image:
    """Pillow's SMOOTH: the mean of 3 x 3 pixels, the middle one five times; borders stay."""
    height, width, channels = pixels.shape
    # The last two axes as one, because XLA runs over a last axis of 3 one by one on the CPU.
    lines = pixels.astype(jnp.float32).reshape(height, -1)
    padded = jnp.pad(lines, ((1, 1), (channels, channels)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    total = rows[:, : -2 * channels] + rows[:, channels:-channels] + rows[:, 2 * channels :]
    smoothed = jnp.floor((total + 4 * lines) / 13 + 0.5)
    row, place = jnp.arange(height)[:, None], jnp.arange(width * channels)[None]
    inside = (row > 0) & (row < height - 1) & (place >= channels)
    inside &= place < (width - 1) * channels
    return jnp.where(inside, smoothed, lines).reshape(pixels.shape)
