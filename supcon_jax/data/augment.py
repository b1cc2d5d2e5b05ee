"""Random image operations in JAX: key first, one example, floats in [0, 1]; `vmap` for a batch.

Every operation has the form `(key, [height, width, channels]) -> [height, width, channels]`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Image = Float[Array, "height width channels"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

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
    keys = jax.random.split(key, 4)
    share = jax.random.uniform(keys[0], minval=area[0], maxval=area[1])
    log_ratio = jax.random.uniform(keys[1], minval=math.log(ratio[0]), maxval=math.log(ratio[1]))
    crop_width = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(log_ratio)), width)
    crop_height = jnp.minimum(jnp.sqrt(share * height * width * jnp.exp(-log_ratio)), height)
    top = jax.random.uniform(keys[2]) * (height - crop_height)
    left = jax.random.uniform(keys[3]) * (width - crop_width)
    rows = _bilinear(size, height, top, crop_height)
    columns = _bilinear(size, width, left, crop_width)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ph,hwc,qw->pqc", rows, image, columns, precision=highest, optimize="optimal")


def _bilinear(size: int, source: int, start: Scalar, length: Scalar) -> Float[Array, "size source"]:
    """Row p holds the weights of the source pixels in result pixel p; pixel centres at .5."""
    at = start + (jnp.arange(size) + 0.5) * (length / size) - 0.5
    at = jnp.clip(at, 0, source - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - jnp.arange(source)))


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
    keys = jax.random.split(key, 6)

    def factor(key: PRNGKey, strength: float) -> Scalar:
        return jax.random.uniform(key, minval=max(0.0, 1 - strength), maxval=1 + strength)

    operations = [
        partial(adjust_brightness, factor=factor(keys[0], brightness)),
        partial(adjust_contrast, factor=factor(keys[1], contrast)),
    ]
    if image.shape[-1] == 3:
        operations += [
            partial(adjust_saturation, factor=factor(keys[2], saturation)),
            partial(adjust_hue, turn=jax.random.uniform(keys[3], minval=-hue, maxval=hue)),
        ]
    order = jax.random.permutation(keys[4], len(operations))
    result = image
    for place in range(len(operations)):
        result = jax.lax.switch(order[place], operations, result)
    return jnp.where(jax.random.bernoulli(keys[5], probability), result, image)


def adjust_brightness(image: Image, factor: Scalar) -> Image:
    """Blend with black: factor x image."""
    return jnp.clip(factor * image, 0, 1)


def adjust_contrast(image: Image, factor: Scalar) -> Image:
    """Blend with the mean luminance of the image."""
    return _blend(image, _luminance(image).mean(), factor)


def adjust_saturation(image: Image, factor: Scalar) -> Image:
    """Blend with the luminance of each pixel."""
    return _blend(image, _luminance(image), factor)


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
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = jnp.mod(jnp.array([5.0, 3.0, 1.0], image.dtype) + (hue + 6 * turn)[..., None], 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _luminance(image: Image) -> Float[Array, "height width 1"]:
    if image.shape[-1] == 1:
        return image
    red, green, blue = (image[..., c] * GREY[c] for c in range(3))
    return (red + green + blue)[..., None]


def _blend(image: Image, other: Array, factor: Scalar) -> Image:
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)
