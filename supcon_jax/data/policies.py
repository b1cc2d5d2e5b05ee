"""Augmentation policies: which operations of `augment` each view of an image goes through."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from supcon_jax.data import augment, randaugment

Operation = Callable[..., Array]
Policy = Sequence[Operation]
Images = UInt8[Array, "batch stored height width channels"]
Views = Float[Array, "batch views size size channels"]

POLICIES: dict[str, tuple[str, ...]] = {  # what is between the flip and the cutout
    "crop_flip": (),
    "sim_augment": ("jitter", "grey", "blur"),
    "auto_augment": ("auto_augment",),
    "rand_augment": ("rand_augment",),
    "stacked_rand_augment": ("jitter", "rand_augment", "grey", "blur"),
}
MIXES = {"mixup": augment.mixup, "cutmix": augment.cutmix}


def make_policy(
    name: str,
    *,
    size: int,
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    shift: int = 0,
    flip: float = 0.5,
    jitter: float = 0.5,
    jitter_probability: float = 0.8,
    jitter_form: str = "torchvision",
    grey: float = 0.2,
    blur: float = 0.0,
    table: str = "imagenet",
    layers: int = 2,
    magnitude: float = 10.0,
    cutout: int = 0,
    host_crop: bool = False,
) -> Policy:
    """The operations of a policy, without those that would do nothing.

    All begin with crop, shift and flip and end with cutout; between them are, in this order,

    - "crop_flip": nothing;
    - "sim_augment": colour jitter, grey, blur (SimCLR);
    - "auto_augment": AutoAugment;
    - "rand_augment": RandAugment;
    - "stacked_rand_augment": colour jitter, RandAugment, grey, blur, as the authors' code has it;
      the paper's text puts RandAugment before the jitter.

    A setting counts where the policy has its operation.

    Args:
      name: of the policy.
      size: side of the views in pixels.
      crop_area: smallest and largest share of the image's area.
      crop_ratio: smallest and largest width / height of the crop.
      shift: largest move after the crop, in pixels, filled with zeros.
      flip: probability of mirroring left and right.
      jitter: strength s; brightness, contrast and saturation 0.8 s, hue 0.2 s.
      jitter_probability: probability of the colour jitter.
      jitter_form: "torchvision" or "tensorflow".
      grey: probability of dropping the colours.
      blur: probability of the blur.
      table: "imagenet" or "cifar", of AutoAugment.
      layers: operations of RandAugment one after the other.
      magnitude: of RandAugment, 0 to 10.
      cutout: side of the grey square in pixels, 0 for none.
      host_crop: the images are crops of `size` already, made while they were decoded.

    Returns:
      The operations.

    Raises:
      ValueError: a name or a number that cannot be.

    References:
      Khosla et al., 2020, https://arxiv.org/abs/2004.11362, supplement section 12;
      https://github.com/google-research/google-research/tree/master/supcon (preprocessing.py).
    """
    _check_choice("name", name, POLICIES)
    _check_choice("jitter_form", jitter_form, augment.JITTER_FORMS)
    _check_choice("table", table, randaugment.TABLES)
    _check("size", size, size > 0, "positive")
    low, high = crop_area
    _check("crop_area", crop_area, 0 < low <= high <= 1, "two shares with 0 < first <= second <= 1")
    low, high = crop_ratio
    _check("crop_ratio", crop_ratio, 0 < low <= high, "two ratios with 0 < first <= second")
    _check("shift", shift, shift >= 0, "0 or more pixels")
    for field, value in (
        ("flip", flip),
        ("jitter_probability", jitter_probability),
        ("grey", grey),
        ("blur", blur),
    ):
        _check(field, value, 0 <= value <= 1, "a probability from 0 to 1")
    _check("jitter", jitter, 0 <= jitter <= 2.5, "from 0 to 2.5, where the hue may turn half round")
    _check("layers", layers, layers >= 0, "0 or more operations")
    _check("magnitude", magnitude, 0 <= magnitude <= 10, "from 0 to 10")
    _check("cutout", cutout, cutout >= 0, "0 or more pixels")

    crop = partial(augment.random_resized_crop, size=size, area=crop_area, ratio=crop_ratio)
    colours = partial(
        augment.color_jitter,
        brightness=0.8 * jitter,
        contrast=0.8 * jitter,
        saturation=0.8 * jitter,
        hue=0.2 * jitter,
        probability=jitter_probability,
        form=jitter_form,
    )
    rand = partial(randaugment.rand_augment, layers=layers, magnitude=magnitude)
    available = {  # whether it does anything, and what
        "crop": (not host_crop, crop),
        "shift": (shift > 0, partial(augment.random_shift, pixels=shift)),
        "flip": (flip > 0, partial(augment.random_flip, probability=flip)),
        "jitter": (jitter > 0 and jitter_probability > 0, colours),
        "grey": (grey > 0, partial(augment.random_grey, probability=grey)),
        "blur": (blur > 0, partial(augment.gaussian_blur, probability=blur)),
        "auto_augment": (True, partial(randaugment.auto_augment, table=table)),
        "rand_augment": (layers > 0, rand),
        "cutout": (cutout > 0, partial(augment.cutout, side=cutout)),
    }
    order = ("crop", "shift", "flip", *POLICIES[name], "cutout")
    return [available[step][1] for step in order if available[step][0]]


def _check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    _check(field, value, value in choices, f"one of {', '.join(choices)}")


def _check(field: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{field} must be {expected}; got {value!r}")


def make_views(
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
    *,
    policies: Sequence[Policy],
    mean: Sequence[float],
    std: Sequence[float],
    mix: str = "none",
) -> Views:
    """One view an image for each policy, each with randomness of its own; or one mixed view.

    Args:
      keys: `[batch]`, one an image; the views of an image depend on its own key alone.
      batch: "image" `[batch, stored, height, width, channels]` uint8, where `stored` is 1, or the
        number of views where each view starts from an image of its own; to mix, 2: the image and
        its partner, and "share" `[batch]`, what of the mixed view is the image.
      policies: one a view; to mix, the one that both images go through.
      mean: of each channel, on [0, 1] pixels; subtracted.
      std: of each channel; divided by.
      mix: "none", "mixup" or "cutmix", see `augment`.

    Returns:
      `[batch, views, size, size, channels]` float32.

    Raises:
      ValueError: an unknown mix, or to mix, not one policy or not two images.
    """
    images: Images = batch["image"]
    _check_choice("mix", mix, ("none", *MIXES))
    if mix == "none":
        return normalize(jax.vmap(partial(_views, policies))(keys, images), mean, std)
    _check("the number of policies", len(policies), len(policies) == 1, f"1 for mix={mix!r}")
    _check(
        "the number of stored images", images.shape[1], images.shape[1] == 2, f"2 for mix={mix!r}"
    )

    def mixed(key: Array, stored: Array, share: Array) -> Array:
        to_make, to_mix = jax.random.split(key)
        image, partner = _views([*policies, *policies], to_make, stored)
        return MIXES[mix](to_mix, image, partner, share)[None]

    return normalize(jax.vmap(mixed)(keys, images, batch["share"]), mean, std)


def _views(policies: Sequence[Policy], key: Array, stored: Array) -> Array:
    """Of one example, `[views, size, size, channels]`; a policy of all views is compiled once."""
    counts = [len(policy) for policy in policies]
    keys = jax.random.split(key, sum(counts))
    if all(policy is policies[0] for policy in policies):
        each = None if len(stored) == 1 else 0
        mapped = jax.vmap(partial(_view, policies[0]), (0, each))
        return mapped(keys.reshape(len(policies), -1), stored[0] if each is None else stored)
    starts = np.cumsum([0, *counts])
    views = [
        _view(policy, keys[start : start + count], stored[view % len(stored)])
        for view, (policy, start, count) in enumerate(zip(policies, starts, counts, strict=False))
    ]
    return jnp.stack(views)


def _view(policy: Policy, keys: Array, pixels: Array) -> Array:
    image = pixels.astype(jnp.float32) / 255
    for operation, key in zip(policy, keys, strict=True):
        image = operation(key, image)
    return image


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
