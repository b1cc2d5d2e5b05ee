"""Random image operations in JAX: key first, one example, floats in [0, 1]; `vmap` for a batch.

Every operation has the form `(key, [height, width, channels]) -> [height, width, channels]`.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Image = Float[Array, "height width channels"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

ORDERS = np.array(list(itertools.permutations(range(4))))
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh the channels


def one_by_one(
    function: Callable[..., Array], at_once: Callable[..., Array] | None = None
) -> Callable[..., Array]:
    """The function, which under `vmap` takes one example after the other where it runs on a CPU.

    There, `lax.cond` and `lax.switch` compute one branch alone, and what is computed stays in the
    cache. An ordinary `vmap`, as accelerators have it, computes all branches for all examples.

    Args:
      function: of arrays.
      at_once: what accelerators run, by default the same.

    Returns:
      A function of the same arguments.
    """
    on_cpu = jax.custom_batching.sequential_vmap(function)
    return partial(jax.lax.platform_dependent, cpu=on_cpu, default=at_once or function)


def random_resized_crop(
    key: PRNGKey,
    image: Image,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "size size channels"]:
    """A random part of the image, resized to a square by bilinear interpolation.

    The part has a uniform share of the image's area and a log-uniform ratio of width to height, at
    a uniform place; sides longer than the image's are cut to it (torchvision draws again instead).

    Args:
      key: random key.
      image: `[height, width, channels]`.
      size: side of the result in pixels.
      area: smallest and largest share of the area.
      ratio: smallest and largest width / height.

    Returns:
      `[size, size, channels]`.

    References:
      Szegedy et al., 2014, https://arxiv.org/abs/1409.4842, section 6.
    """
    height, width, _ = image.shape
    draws = jax.random.uniform(key, (4,), image.dtype)
    share = _between(draws[0], *area)
    log_ratio = _between(draws[1], math.log(ratio[0]), math.log(ratio[1]))
    crop_width = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(log_ratio)), width)
    crop_height = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(-log_ratio)), height)
    top = draws[2] * (height - crop_height)
    left = draws[3] * (width - crop_width)
    rows = _interpolated(image, 0, size, top, crop_height)
    return _interpolated(rows, 1, size, left, crop_width)


def _interpolated(image: Array, axis: int, size: int, start: Scalar, length: Scalar) -> Array:
    """`size` lines across an axis, each between its two nearest; pixel centres are at .5."""
    at = start + (jnp.arange(size) + 0.5) * (length / size) - 0.5
    at = jnp.clip(at, 0, image.shape[axis] - 1)
    low = at.astype(jnp.int32)
    share = (at - low).reshape([-1 if other == axis else 1 for other in range(3)])
    below, above = (jnp.take(image, lines, axis, mode="clip") for lines in (low, low + 1))
    return (1 - share) * below + share * above


# Shift and flip look pixels up, where padding, slicing or a choice between two images would do:
# XLA's CPU would compute what came before anew, and slowly, for each of their parts.


def random_shift(key: PRNGKey, image: Image, *, pixels: int) -> Image:
    """Move the image by up to `pixels` in each direction, filling with zeros (pad and crop)."""
    moves = jax.random.randint(key, (2,), -pixels, pixels + 1)
    rows, columns = (
        jnp.where((at >= 0) & (at < length), at, length)
        for length, move in zip(image.shape, moves, strict=False)
        for at in [jnp.arange(length) + move]
    )
    return image.at[rows[:, None], columns[None]].get(mode="fill", fill_value=0)


def random_flip(key: PRNGKey, image: Image, *, probability: float = 0.5) -> Image:
    """Mirror left and right with the given probability."""
    columns = jnp.arange(image.shape[1])
    chosen = jnp.where(jax.random.bernoulli(key, probability), columns[::-1], columns)
    return image.at[:, chosen].get(mode="promise_in_bounds")


def random_grey(key: PRNGKey, image: Image, *, probability: float = 0.2) -> Image:
    """Replace the colours by their luminance with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability), _luminance(image), image)


def color_jitter(
    key: PRNGKey,
    image: Image,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float = 0.8,
    form: str = "torchvision",
) -> Image:
    """Random brightness, contrast, saturation and hue, in random order, clipped after each.

    "torchvision": the first three blend with black, the mean luminance, and the luminance, by a
    factor uniform in [max(0, 1 - strength), 1 + strength]: factor * image + (1 - factor) * other.
    "tensorflow": brightness adds a number uniform in [-strength, strength] instead; contrast blends
    with the mean of each channel; saturation multiplies that of HSV, which is cut to 1, keeping hue
    and value. In both, hue turns by a uniform share of the circle in [-hue, hue].

    Args:
      key: random key.
      image: `[height, width, 3]`, or `[height, width, 1]` where saturation and hue do nothing.
      brightness: strength.
      contrast: strength.
      saturation: strength.
      hue: largest turn, in circles; at most 0.5.
      probability: that anything happens.
      form: "torchvision" or "tensorflow".

    Returns:
      The shape of `image`.

    Raises:
      ValueError: unknown form.

    References:
      Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, appendix A;
      https://docs.pytorch.org/vision/main/generated/torchvision.transforms.ColorJitter.html;
      https://www.tensorflow.org/api_docs/python/tf/image (adjust_brightness, _contrast, ...).
    """
    if form not in JITTER_FORMS:
        raise ValueError(f"form must be one of {', '.join(JITTER_FORMS)}; got {form!r}")
    draws = jax.random.uniform(key, (6,), image.dtype)
    order = jnp.array(ORDERS)[jnp.int32(draws[4] * len(ORDERS))]
    strengths = (brightness, contrast, saturation)
    low = [max(0.0, 1 - strength) for strength in strengths] + [-hue]
    high = [1 + strength for strength in strengths] + [hue]
    if form == "tensorflow":
        low[0], high[0] = -brightness, brightness
    values = _between(draws[:4], jnp.array(low, image.dtype), jnp.array(high, image.dtype))[order]

    def step(image: Image, which_value: tuple[Array, Array]) -> tuple[Image, None]:
        which, value = which_value
        return jnp.clip(jax.lax.switch(which, JITTER_FORMS[form], image, value), 0, 1), None

    def jittered(image: Image, order: Array, values: Array) -> Image:
        return jax.lax.scan(step, image, (order, values))[0]

    def maybe(applied: Array, image: Image, order: Array, values: Array) -> Image:
        return jax.lax.cond(applied, jittered, lambda image, *_: image, image, order, values)

    return one_by_one(maybe)(draws[5] < probability, image, order, values)


def _multiply(image: Image, factor: Scalar) -> Image:
    return factor * image


def _contrast(image: Image, factor: Scalar) -> Image:
    return _blend(image, _luminance(_means(image)), factor)


def _saturation(image: Image, factor: Scalar) -> Image:
    return _blend(image, _luminance(image), factor)


def _add(image: Image, number: Scalar) -> Image:
    return image + number


def _channel_contrast(image: Image, factor: Scalar) -> Image:
    return _blend(image, _means(image), factor)


def _hsv_saturation(image: Image, factor: Scalar) -> Image:
    """A factor on the saturation of HSV moves each channel away from the value by that factor."""
    value, least = _extremes(image)
    highest = value / jnp.maximum(value - least, 1e-6)  # the factor that makes the saturation 1
    return _blend(image, value, jnp.minimum(factor, highest))


def _blend(image: Image, other: Array, factor: Array) -> Image:
    return factor * image + (1 - factor) * other


def adjust_hue(image: Image, turn: Scalar) -> Image:
    """Turn the hue of an RGB image by a share of the circle, keeping HSV saturation and value.

    Each channel of a colour with hue h (in sixths) is value - chroma * clip(2 - d, 0, 1), where d
    is the distance of h on the circle of 6 from 3, 5 and 1 for red, green and blue.

    Args:
      image: `[height, width, 3]`, or `[height, width, 1]` which has no hue.
      turn: in circles.

    Returns:
      The shape of `image`.
    """
    if image.shape[-1] == 1:
        return image
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, least = (extreme[..., 0] for extreme in _extremes(image))
    chroma = value - least
    safe = jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    away = (hue + 6 * turn)[..., None] - (3 + 2 * jnp.arange(3).reshape(1, 1, 3))
    distance = jnp.abs(away - 6 * jnp.round(away / 6))  # jnp.mod is slow on the CPU
    return value[..., None] - chroma[..., None] * jnp.clip(2 - distance, 0, 1)


JITTER_FORMS = {  # brightness, contrast, saturation, hue
    "torchvision": (_multiply, _contrast, _saturation, adjust_hue),
    "tensorflow": (_add, _channel_contrast, _hsv_saturation, adjust_hue),
}


def _means(image: Image) -> Float[Array, "1 1 channels"]:
    """Of each channel; rows first, because XLA's sum over a last axis of 3 is slow on the CPU."""
    return image.mean(0, keepdims=True).mean(1, keepdims=True)


def _extremes(image: Image) -> tuple[Array, Array]:
    """The largest and the smallest channel, `[height, width, 1]` each."""
    channels = [image[..., c : c + 1] for c in range(image.shape[-1])]
    return reduce(jnp.maximum, channels), reduce(jnp.minimum, channels)


def gaussian_blur(
    key: PRNGKey,
    image: Image,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> Image:
    """Blur by a normalised Gaussian exp(-d^2 / (2 sigma^2)), cut off at a twentieth of the height.

    Of height h it has 2 ((h // 10) // 2) + 1 taps along both axes: 23 at 224, 3 at 32, and 1, which
    changes nothing, below 20. The image is mirrored at its borders without repeating the last line;
    the authors' code fills with zeros there, which darkens the borders.

    Args:
      key: random key.
      image: `[height, width, channels]`.
      sigma: smallest and largest standard deviation in pixels, drawn uniformly.
      probability: that anything happens.

    Returns:
      The shape of `image`.

    References:
      Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, appendix A.
    """
    draws = jax.random.uniform(key, (2,), image.dtype)

    def maybe(applied: Array, image: Image, sigma: Scalar) -> Image:
        return jax.lax.cond(applied, _blurred, lambda image, _: image, image, sigma)

    return one_by_one(maybe)(draws[1] < probability, image, _between(draws[0], *sigma))


def _blurred(image: Image, sigma: Scalar) -> Image:
    height, width, channels = image.shape
    radius = (height // 10) // 2
    weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-radius, radius + 1) / sigma))
    weights = weights / weights.sum()
    # The last two axes as one, because XLA runs over a last axis of 3 one by one on the CPU.
    padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    lines = padded.reshape(height + 2 * radius, -1)
    rows = sum(weight * lines[k : k + height] for k, weight in enumerate(weights))
    moved = (rows[:, k * channels : (k + width) * channels] for k in range(2 * radius + 1))
    blurred = sum(weight * part for weight, part in zip(weights, moved, strict=True))
    return blurred.reshape(image.shape)


def cutout(key: PRNGKey, image: Image, *, side: int) -> Image:
    """Fill a square around a random pixel with grey, 0.5; what is outside of the image is cut off.

    Args:
      key: random key.
      image: `[height, width, channels]`.
      side: of the square, in pixels; 0 changes nothing.

    Returns:
      The shape of `image`.

    References:
      DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552.
    """
    height, width, _ = image.shape
    centre = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    top, left = centre - side // 2
    rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
    inside = ((rows >= 0) & (rows < side))[:, None] & ((columns >= 0) & (columns < side))[None]
    return jnp.where(inside[..., None], 0.5, image)


def mixup(key: PRNGKey, image: Image, partner: Image, share: Scalar) -> Image:
    """share * image + (1 - share) * partner.

    Args:
      key: not used, there is nothing random; it makes the signature that of `cutmix`.
      image: `[height, width, channels]`.
      partner: the same shape.
      share: of the image, from 0 to 1.

    Returns:
      The shape of `image`.

    References:
      Zhang et al., 2017, https://arxiv.org/abs/1710.09412.
    """
    return share * image + (1 - share) * partner


def cutmix(key: PRNGKey, image: Image, partner: Image, share: Scalar) -> Image:
    """The image with a box from its partner, which has 1 - share of the area.

    The sides of the box are sqrt(1 - share) of the image's, and it is anywhere inside. Its corners
    are real numbers, and a pixel that it covers in part is blended by that part, so that the
    partner's weight is 1 - share exactly. In the paper the corners are whole pixels around a centre
    anywhere, the box is cut off at the border, and the share of the label is computed again.

    Args:
      key: random key.
      image: `[height, width, channels]`.
      partner: the same shape.
      share: of the image, from 0 to 1.

    Returns:
      The shape of `image`.

    References:
      Yun et al., 2019, https://arxiv.org/abs/1905.04899.
    """
    draws = jax.random.uniform(key, (2,), image.dtype)
    side = jnp.sqrt(1 - share)
    rows, columns = (
        _covered(length, draw * (1 - side) * length, side * length)
        for length, draw in zip(image.shape, draws, strict=False)
    )
    weight = (rows[:, None] * columns[None])[..., None]
    return (1 - weight) * image + weight * partner


def _covered(length: int, start: Scalar, width: Scalar) -> Float[Array, " length"]:
    """The part of each of `length` pixels that is between start and start + width."""
    pixel = jnp.arange(length)
    return jnp.clip(jnp.minimum(pixel + 1, start + width) - jnp.maximum(pixel, start), 0, 1)


def _between(draw: Array, low: float | Array, high: float | Array) -> Array:
    return low + draw * (high - low)


def _luminance(image: Image) -> Float[Array, "height width 1"]:
    if image.shape[-1] == 1:
        return image
    red, green, blue = (image[..., c] * GREY[c] for c in range(3))
    return (red + green + blue)[..., None]
