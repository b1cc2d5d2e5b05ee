"""Random image operations in JAX: key first, one example, floats in [0, 1]; `vmap` for a batch.

Every operation has the form `(key, [height, width, channels]) -> [height, width, channels]`.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Image = Float[Array, "height width channels"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

HUE = 3  # place among brightness, contrast, saturation, hue
ORDERS = np.array(list(itertools.permutations(range(4))))
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh the channels


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
    draws = jax.random.uniform(key, (4,))
    share = _between(draws[0], *area)
    log_ratio = _between(draws[1], math.log(ratio[0]), math.log(ratio[1]))
    crop_width = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(log_ratio)), width)
    crop_height = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(-log_ratio)), height)
    top = draws[2] * (height - crop_height)
    left = draws[3] * (width - crop_width)
    rows = _bilinear(size, height, top, crop_height)
    columns = _bilinear(size, width, left, crop_width)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ph,hwc,qw->pqc", rows, image, columns, precision=highest, optimize="optimal")


def _bilinear(size: int, source: int, start: Scalar, length: Scalar) -> Float[Array, "size source"]:
    """Row p holds the weights of the source pixels in result pixel p; pixel centres at .5."""
    at = start + (jnp.arange(size) + 0.5) * (length / size) - 0.5
    at = jnp.clip(at, 0, source - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - jnp.arange(source)[None]))


def random_shift(key: PRNGKey, image: Image, *, pixels: int) -> Image:
    """Move the image by up to `pixels` in each direction, filling with zeros (pad and crop)."""
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key: PRNGKey, image: Image, *, probability: float = 0.5) -> Image:
    """Mirror left and right with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


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
) -> Image:
    """Random brightness, contrast, saturation and hue, in random order (torchvision's form).

    The first three blend with black, the mean luminance, and the luminance, by a factor uniform in
    [max(0, 1 - strength), 1 + strength]; hue turns by a uniform share of the circle in [-hue, hue].
    Values are clipped to [0, 1] after each.

    Args:
      key: random key.
      image: `[height, width, 3]`, or `[height, width, 1]` where saturation and hue do nothing.
      brightness: strength.
      contrast: strength.
      saturation: strength.
      hue: largest turn, in circles; at most 0.5.
      probability: that anything happens.

    Returns:
      The shape of `image`.

    References:
      Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, appendix A.
    """
    draws = jax.random.uniform(key, (6,))
    strengths = (brightness, contrast, saturation)
    lowest = jnp.array([max(0.0, 1 - strength) for strength in strengths] + [1.0])
    highest = jnp.array([1 + strength for strength in strengths] + [1.0])
    order = jnp.array(ORDERS)[jnp.int32(draws[4] * len(ORDERS))]
    factors = _between(draws[:4], lowest, highest)[order]
    mean_share = jnp.array([0.0, 1.0, 0.0, 0.0])[order]
    pixel_share = jnp.array([0.0, 0.0, 1.0, 0.0])[order]
    before_hue = jnp.cumsum(order == HUE) == 0

    # Hue is the costly one, so it stands once, between all blends that may come before and after
    # it; those on the wrong side have the factor 1, which changes nothing.
    def blend(image: Image, place: int, active: Array) -> Image:
        grey = _luminance(image)
        other = mean_share[place] * grey.mean() + pixel_share[place] * grey
        factor = jnp.where(active, factors[place], 1.0)
        return jnp.clip(factor * image + (1 - factor) * other, 0, 1)

    result = image
    for place in (0, 1, 2):
        result = blend(result, place, before_hue[place])
    if image.shape[-1] == 3:
        result = adjust_hue(result, _between(draws[3], -hue, hue))
    for place in (1, 2, 3):
        result = blend(result, place, ~before_hue[place])
    return jnp.where(draws[5] < probability, result, image)


def adjust_hue(image: Image, turn: Scalar) -> Image:
    """Turn the hue of an RGB image by a share of the circle, keeping HSV saturation and value.

    Each channel of a colour with hue h (in sixths) is value - chroma * clip(min(k, 4 - k), 0, 1)
    with k = (5, 3, 1) + h modulo 6.
    """
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    chroma = value - image.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offsets = jnp.array([5.0, 3.0, 1.0], image.dtype).reshape(1, 1, 3)
    k = jnp.mod(offsets + (hue + 6 * turn)[..., None], 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _between(draw: Array, low: float | Array, high: float | Array) -> Array:
    return low + draw * (high - low)


def _luminance(image: Image) -> Float[Array, "height width 1"]:
    if image.shape[-1] == 1:
        return image
    red, green, blue = (image[..., c] * GREY[c] for c in range(3))
    return (red + green + blue)[..., None]
