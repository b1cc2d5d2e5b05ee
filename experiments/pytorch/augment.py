"""Augmentations of a batch of images on its device, in PyTorch: crop, flip, colour jitter, grey."""

import math

import torch
from torch.nn import functional

GREY = (0.299, 0.587, 0.114)


def views(
    images: torch.Tensor,
    *,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    jitter: float,
    jitter_probability: float,
    grey: float,
) -> torch.Tensor:
    """One random view of each image.

    Args:
      images: `[n, channels, h, w]` in [0, 1].
      size: side of the views in pixels.
      area: smallest and largest share of the image in the crop.
      ratio: smallest and largest width / height of the crop.
      flip: probability of mirroring.
      jitter: strength s: brightness, contrast and saturation 0.8 s, hue 0.2 s, in random order.
      jitter_probability: of the jitter.
      grey: probability of grey.

    Returns:
      `[n, channels, size, size]` in [0, 1].
    """
    found = crop_and_flip(images, size, area, ratio, flip)
    if jitter and found.shape[1] == 3:
        chosen = _chosen(found, jitter_probability)
        found = torch.where(chosen, colour_jitter(found, 0.8 * jitter, 0.2 * jitter), found)
    if grey and found.shape[1] == 3:
        found = torch.where(_chosen(found, grey), _luminance(found).expand_as(found), found)
    return found


def crop_and_flip(
    images: torch.Tensor,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> torch.Tensor:
    """A random part of each image, bilinearly resized, mirrored with a probability."""
    n, channels = images.shape[:2]
    share = _uniform(images, n, *area)
    log_ratio = _uniform(images, n, math.log(ratio[0]), math.log(ratio[1]))
    width = (share * log_ratio.exp()).sqrt().clamp(max=1.0)
    height = (share * (-log_ratio).exp()).sqrt().clamp(max=1.0)
    x = _uniform(images, n, -1.0, 1.0) * (1 - width)
    y = _uniform(images, n, -1.0, 1.0) * (1 - height)
    side = torch.where(torch.rand(n, device=images.device) < flip, -1.0, 1.0)
    zero = torch.zeros_like(x)
    rows = torch.stack([torch.stack([side * width, zero, x], 1),
                        torch.stack([zero, height, y], 1)], 1)  # fmt: skip
    grid = functional.affine_grid(rows, [n, channels, size, size], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def colour_jitter(images: torch.Tensor, strength: float, hue: float) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each image in its own random order."""
    n = len(images)
    factors = [_uniform(images, (n, 1, 1, 1), max(0.0, 1 - strength), 1 + strength) for _ in "bcs"]
    turn = _uniform(images, (n, 1, 1), -hue, hue)
    operations = (
        lambda x: _blend(x, torch.zeros_like(x), factors[0]),
        lambda x: _blend(x, _luminance(x).mean((2, 3), keepdim=True), factors[1]),
        lambda x: _blend(x, _luminance(x), factors[2]),
        lambda x: _turned(x, turn),
    )
    order = torch.rand(n, 4, device=images.device).argsort(1)
    for place in range(4):
        made = torch.stack([operation(images) for operation in operations])
        images = made[order[:, place], torch.arange(n, device=images.device)]
    return images


def _uniform(like: torch.Tensor, shape: int | tuple[int, ...], low: float, high: float):
    return torch.rand(shape, device=like.device) * (high - low) + low


def _chosen(images: torch.Tensor, probability: float) -> torch.Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) < probability


def _luminance(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _turned(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The hue turned by a share of the circle."""
    red, green, blue = images.unbind(1)
    value, smallest = images.amax(1), images.amin(1)
    spread = value - smallest
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6 + turn) % 1.0
    parts = [(n + 6 * hue) % 6 for n in (5, 3, 1)]
    return torch.stack([value - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in parts], 1)
