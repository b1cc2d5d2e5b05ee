"""Augmentation policies: which operations of `augment` each view of an image goes through."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from supcon_jax.data import augment

Operation = Callable[..., Array]
Policy = Sequence[Operation]
Images = UInt8[Array, "batch stored height width channels"]
Views = Float[Array, "batch views size size channels"]


def sim_augment(
    *,
    size: int,
    crop_area: tuple[float, float],
    crop_ratio: tuple[float, float],
    shift: int,
    flip: float,
    jitter: float,
    jitter_probability: float,
    grey: float,
) -> Policy:
    """Crop, shift, flip, colour jitter and grey: SimCLR's policy without blur.

    Args:
      size: side of the views in pixels.
      crop_area: smallest and largest share of the image's area.
      crop_ratio: smallest and largest width / height of the crop.
      shift: largest move after the crop, in pixels, filled with zeros.
      flip: probability of mirroring left and right.
      jitter: strength s; brightness, contrast and saturation 0.8 s, hue 0.2 s.
      jitter_probability: probability of the colour jitter.
      grey: probability of dropping the colours.

    Returns:
      The operations, without those that would do nothing.

    References:
      Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, appendix A.
    """
    operations: list[Operation] = [
        partial(augment.random_resized_crop, size=size, area=crop_area, ratio=crop_ratio)
    ]
    if shift > 0:
        operations.append(partial(augment.random_shift, pixels=shift))
    if flip > 0:
        operations.append(partial(augment.random_flip, probability=flip))
    if jitter > 0:
        operations.append(
            partial(
                augment.color_jitter,
                brightness=0.8 * jitter,
                contrast=0.8 * jitter,
                saturation=0.8 * jitter,
                hue=0.2 * jitter,
                probability=jitter_probability,
            )
        )
    if grey > 0:
        operations.append(partial(augment.random_grey, probability=grey))
    return operations


def make_views(
    keys: Key[Array, " batch"],
    images: Images,
    *,
    policies: Sequence[Policy],
    mean: Sequence[float],
    std: Sequence[float],
) -> Views:
    """One view an image for each policy, each with randomness of its own.

    Args:
      keys: `[batch]`, one an image; the views of an image depend on its own key alone.
      images: `[batch, stored, height, width, channels]` uint8; `stored` is 1, or the number of
        views where each view starts from an image of its own.
      policies: one a view.
      mean: of each channel, on [0, 1] pixels; subtracted.
      std: of each channel; divided by.

    Returns:
      `[batch, views, size, size, channels]` float32.
    """

    def of_one(key: Array, stored: Array) -> Array:
        subkeys = iter(jax.random.split(key, sum(len(policy) for policy in policies)))
        views = []
        for view, policy in enumerate(policies):
            image = stored[view % len(stored)].astype(jnp.float32) / 255
            for operation in policy:
                image = operation(next(subkeys), image)
            views.append(image)
        return jnp.stack(views)

    return normalize(jax.vmap(of_one)(keys, images), mean, std)


def center_crop(
    images: UInt8[Array, "batch stored height width channels"],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "batch size size channels"]:
    """The middle of the first stored image, for evaluation.

    Args:
      images: `[batch, stored, height, width, channels]` uint8, at least `size` pixels a side.
      size: side of the result in pixels.
      mean: of each channel, on [0, 1] pixels; subtracted.
      std: of each channel; divided by.

    Returns:
      `[batch, size, size, channels]` float32.
    """
    height, width = images.shape[2:4]
    top, left = (height - size) // 2, (width - size) // 2
    middle = images[:, 0, top : top + size, left : left + size]
    return normalize(middle.astype(jnp.float32) / 255, mean, std)


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images - mean) / std for each channel (the last axis)."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images - jnp.array(mean, images.dtype).reshape(shape)) / jnp.array(
        std, images.dtype
    ).reshape(shape)


POLICIES: dict[str, Callable[..., Policy]] = {"sim_augment": sim_augment}
