"""The 15 corruptions of ImageNet-C and CIFAR-10-C, and the mean corruption error.

Each corruption is a function `(images, parameters) -> images` of float32 pixels from 0 to 255;
those in `RANDOM` have a third argument: where the random numbers of each image come from. What they
share, the work in parts of bounded size and the cut to whole levels, is in `corrupt`.

References:
  Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261. The parameters are those of
  https://github.com/hendrycks/robustness, ImageNet-C/create_c: make_imagenet_c.py and
  make_cifar_c.py.
"""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy.random import PCG64, RandomState, SeedSequence
from PIL import Image

from supcon_jax.config import nearest
from supcon_jax.data.sources import Loaded, Source

Draws = Sequence[RandomState]  # of each image
Rates = Sequence[float] | np.ndarray  # at severities 1 to 5

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = 5
SMALL = 64  # images with no longer side are corrupted as CIFAR-10-C's
CHUNK = 1 << 22  # pixel values that are worked on at a time
SLACK = 1e-4  # levels, so that the rounding of float32 does not take a whole one
GREY = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601
SLIP = 244 / 224  # the authors have 244 for 224 here; kept

# For severities 1 to 5. What the numbers are, each corruption's docstring says.
IMAGENET: dict[str, tuple] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": (
        (2 * SLIP, 0.7 * SLIP, 0.1 * SLIP),
        (2 * SLIP, 0.08 * SLIP, 0.2 * SLIP),
        (0.05 * SLIP, 0.01 * SLIP, 0.02 * SLIP),
        (0.07 * SLIP, 0.01 * SLIP, 0.02 * SLIP),
        (0.12 * SLIP, 0.01 * SLIP, 0.02 * SLIP),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
CIFAR: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
TABLES = {"imagenet": IMAGENET, "cifar": CIFAR}

# Of the five photographs of frost that the authors use: mean red, green and blue, and the standard
# deviation within 224 pixels (experiments/agreement/corruptions.json); two files are one picture.
FROSTS = np.array(
    (
        (76, 147, 164, 15),
        (198, 203, 212, 20),
        (198, 203, 212, 20),
        (146, 160, 173, 27),
        (100, 112, 124, 35),
    ),
    np.float32,
)
FROST_SHIFT = 7.0  # standard deviation of the mean between parts of a photograph
FROST_DECAY = 1.1  # as in `_plasma`

# AlexNet's error rates, each the mean over the five severities, and on clean images.
ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLEAN_ERROR = 0.4348


def corrupt(
    images: UInt8[np.ndarray, "images height width channels"],
    name: str,
    severity: int,
    *,
    seed: int = 0,
    indices: np.ndarray | None = None,
    table: Literal["imagenet", "cifar"] | None = None,
) -> UInt8[np.ndarray, "images height width channels"]:
    """Images with one of the 15 corruptions.

    What happens to an image is a pure function of the image, (seed, name, severity) and its index:
    images that are corrupted in parts, with their `indices`, are those corrupted at once.

    Fourteen of the corruptions are those of the authors' programs. `frost` is the one corruption
    whose numbers differ: the authors lay photographs of frost over the image, here it is a random
    texture (see `_frost`). The released ImageNet-C was also saved as JPEG of quality 85; this is
    not done here, nor in CIFAR-10-C.

    Args:
      images: `[images, height, width, channels]` uint8, grey (1 channel) or RGB (3).
      name: one of `CORRUPTIONS`.
      severity: 1 to 5.
      seed: of the random numbers, from 0 on.
      indices: `[images]`, the number of each image in its data set; by default 0, 1, 2 and so on.
      table: whose parameters are used: "imagenet" (made for 224 pixels) or "cifar" (for 32). By
        default "cifar" where no side is longer than 64 pixels, else "imagenet". Lengths are in
        pixels whatever the size of the image; only those of elastic_transform are shares of it.

    Returns:
      Images of the same shape, uint8.

    Raises:
      ValueError: an unknown name or table, a severity out of range, other than uint8 images of this
        shape, or a number of indices that is not that of the images.

    References:
      Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261, appendix B.
    """
    _check_name(name, severity)
    _check_images(images)
    chosen = _table(table, images.shape[1:3])
    places = np.arange(len(images)) if indices is None else np.asarray(indices)
    if places.shape != (len(images),):
        raise ValueError(f"expected an index for each of {len(images)} images, got {places.shape}")
    parameters, key = chosen[name][severity - 1], (seed, zlib.crc32(name.encode()), severity)
    step = max(1, CHUNK // int(np.prod(images.shape[1:])))
    out = np.empty_like(images)
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        pixels = images[rows].astype(np.float32)
        if name in FIXED:
            made = FIXED[name](pixels, parameters)
        else:
            made = RANDOM[name](pixels, parameters, [_draws(*key, int(i)) for i in places[rows]])
        out[rows] = np.clip(made + SLACK, 0, 255).astype(np.uint8)
    return out


def corrupted(
    source: Source, name: str, severity: int, seed: int = 0, *, crop: int | None = None
) -> Source:
    """A source whose images are corrupted as they are loaded.

    For evaluation: its `load` corrupts after decoding, and it has no `read`, since there are no
    files of corrupted images to stream. `sources.in_memory` of it corrupts once and keeps that.

    Args:
      source: clean images; image i of it is corrupted with index i.
      name: one of `CORRUPTIONS`.
      severity: 1 to 5.
      seed: of the random numbers, from 0 on.
      crop: side in pixels of the middle square that is cut out first; by default the whole image.
        ImageNet-C is made on the crop of 224 pixels that is evaluated, so where images are loaded
        larger (`data.load_size`), this is to be `data.image_size`: the middle of a corrupted larger
        image has other borders and other fog.

    Returns:
      A source of the same labels.

    Raises:
      ValueError: an unknown name, a severity out of range, or a crop larger than the images.
    """
    _check_name(name, severity)
    height, width, channels = source.image_shape
    side = (crop, crop) if crop is not None else (height, width)
    if not (0 < side[0] <= height and 0 < side[1] <= width):
        raise ValueError(f"crop {crop} does not fit in the images of {height} x {width} pixels")
    top, left = (height - side[0]) // 2, (width - side[1]) // 2

    def load(indices: np.ndarray) -> Loaded:
        images, labels = source.load(indices)
        middle = images[:, top : top + side[0], left : left + side[1]]
        return corrupt(middle, name, severity, seed=seed, indices=indices), labels

    label = f"{source.name} ({name}, severity {severity})"
    return replace(source, name=label, image_shape=(*side, channels), load=load, read=None)


class CorruptionError(NamedTuple):
    """In percent: 100 is as bad as the reference.

    Attributes:
      mce: mean corruption error.
      relative: relative mean corruption error, of what is lost from the clean images on.
    """

    mce: float
    relative: float


def mean_corruption_error(
    errors: Mapping[str, Rates],
    clean: float,
    *,
    reference: Mapping[str, float | Rates] = ALEXNET_ERRORS,
    reference_clean: float = ALEXNET_CLEAN_ERROR,
) -> CorruptionError:
    """Error on corrupted images relative to a reference's (AlexNet's), mean over corruptions.

    With E_cs the error on corruption c at severity s and A_cs the reference's:

        mCE          = 100 mean_c [sum_s E_cs / sum_s A_cs]
        relative mCE = 100 mean_c [sum_s (E_cs - E_clean) / sum_s (A_cs - A_clean)]

    Args:
      errors: of each corruption, the top-1 error rates (0 to 1) at severities 1 to 5.
      clean: error rate on clean images.
      reference: of each corruption, the error rates at the severities, or their mean.
      reference_clean: its error rate on clean images.

    Returns:
      mCE and relative mCE, in percent.

    Raises:
      ValueError: other corruptions than the reference's, not five severities, an error rate out of
        0 to 1, or a reference no worse on corrupted images than on clean ones.

    References:
      Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261, section 4.1.
      AlexNet: https://github.com/hendrycks/robustness, on clean images
      https://github.com/google-research/robustness_metrics.
    """
    found = _checked_errors(errors, clean, reference)
    names = list(reference)
    of_reference = np.array([np.mean(reference[name]) for name in names])
    if not (of_reference > max(reference_clean, 0)).all():
        worst = names[int(of_reference.argmin())]
        raise ValueError(
            f"the reference's error on {worst} is {of_reference.min():.4g}, expected more than "
            f"{reference_clean:.4g}, that on clean images: with less there is no relative error"
        )
    of_model = np.array([np.mean(found[name]) for name in names])
    relative = (of_model - clean) / (of_reference - reference_clean)
    return CorruptionError(
        100 * float((of_model / of_reference).mean()), 100 * float(relative.mean())
    )


def accuracy_by_severity(
    errors: Mapping[str, Rates],
) -> Float[np.ndarray, " severities"]:
    """1 - error at each severity, mean over the corruptions, as in Table 6 of the SupCon paper.

    Args:
      errors: of each corruption, the error rates (0 to 1) at severities 1 to 5.

    Returns:
      `[5]` accuracies.

    References:
      Khosla et al., 2020, https://arxiv.org/abs/2004.11362, supplementary material.
    """
    found = _checked_errors(errors, 0.0, errors)
    return 1 - np.mean(list(found.values()), axis=0)


# Noise


def _gaussian_noise(images: np.ndarray, parameters: float, draws: Draws) -> np.ndarray:
    """Normal noise; its standard deviation, of pixels from 0 to 1."""
    noise = _drawn(draws, lambda of: of.standard_normal(images.shape[1:]))
    return images + 255 * parameters * noise


def _shot_noise(images: np.ndarray, parameters: float, draws: Draws) -> np.ndarray:
    """Poisson noise of counted light; the count that is white."""
    counts = [
        of.poisson(image * (parameters / 255)) for image, of in zip(images, draws, strict=True)
    ]
    return np.stack(counts).astype(np.float32) * (255 / parameters)


def _impulse_noise(images: np.ndarray, parameters: float, draws: Draws) -> np.ndarray:
    """Some values, in each channel on its own, become 0 or 255; their share."""
    uniform = _drawn(draws, lambda of: of.random_sample(images.shape[1:]))
    salted = np.where(uniform > 1 - parameters / 2, 255, images)
    return np.where(uniform < parameters / 2, 0, salted)


# Blur


def _defocus_blur(images: np.ndarray, parameters: tuple) -> np.ndarray:
    """The mean over a disk; its radius, and the standard deviation that smooths its edge.

    As the authors', the smoothed disks of 8 and 10 pixels sum to 1.01: they brighten a little.
    """
    import cv2

    radius, sigma = parameters
    reach = max(8, radius)
    axis = np.arange(-reach, reach + 1)
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
    edge = (3, 3) if radius <= 8 else (5, 5)
    kernel = cv2.GaussianBlur(inside / inside.sum(), edge, sigmaX=sigma)
    return np.stack([cv2.filter2D(image, -1, kernel) for image in images]).reshape(images.shape)


def _glass_blur(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """Pixels moved about between two Gaussian blurs; its sigma, how far, how many times.

    The authors mean to swap each pixel with a random neighbour, in order from the last to the
    first. Their assignment, of NumPy rows, copies the neighbour instead, and so does this.
    """
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    sigma, reach, times = parameters
    height, width = images.shape[1:3]
    blur = partial(gaussian_filter, sigma=(0, sigma, sigma, 0), mode="nearest")
    pixels = np.floor(blur(images) + SLACK)  # whole levels between the two
    shape = (times, height, width, 2)
    moves = np.stack([of.randint(-reach, reach, shape).astype(np.int32) for of in draws])
    image = np.arange(len(images))[:, None]
    for time in range(times):
        for y, x in _fronts(height, width, reach):
            down, right = np.moveaxis(moves[:, time, y, x], -1, 0)
            pixels[:, y, x] = pixels[image, y + down, x + right]
    return blur(pixels)


@cache
def _fronts(height: int, width: int, reach: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the pixels, from the last to the first, that can be moved at once.

    A move touches the 2 reach rows and columns around its pixel. Those of pixels that are one row
    and 2 reach columns apart do not overlap, while all that overlap keep their order.
    """
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    when = (2 * reach * np.arange(len(rows))[:, None] + np.arange(len(columns))).ravel()
    order = np.argsort(when, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(when[order])) + 1)
    places = [divmod(group, max(1, len(columns))) for group in groups if len(group)]
    return [(rows[row], columns[column]) for row, column in places]


def _motion_blur(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """Blur along a line at up to 45 degrees from the horizontal; radius, sigma."""
    radius, sigma = parameters
    moved = [
        _smeared(image, radius, sigma, of.uniform(-45, 45))
        for image, of in zip(images, draws, strict=True)
    ]
    return np.stack(moved)


def _smeared(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """One-sided Gaussian blur in a direction, in degrees; the border is repeated.

    The steps of ImageMagick's motion blur, with which ImageNet-C was made: 2 radius + 1 pixels in a
    row, whole pixels apart.
    """
    height, width = image.shape[:2]
    steps, reach = np.arange(2 * radius + 1), 2 * radius
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = np.deg2rad(angle)
    downs = reach + np.ceil(steps * np.sin(radians) - 0.5).astype(int)
    rights = reach + np.ceil(steps * np.cos(radians) - 0.5).astype(int)
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    out = np.zeros_like(image)
    for weight, down, right in zip(weights.astype(np.float32), downs, rights, strict=True):
        out += weight * padded[down : down + height, right : right + width]
    return out


def _zoom_blur(images: np.ndarray, parameters: tuple) -> np.ndarray:
    """The mean of the image and its enlargements from 1 up to a factor; that factor, the step."""
    count, height, width, channels = images.shape
    columns = np.moveaxis(images.reshape(count, -1, channels), 1, 0).reshape(height * width, -1)
    mixed = _zooming(height, width, *parameters) @ columns
    return np.moveaxis(mixed.reshape(-1, count, channels), 0, 1).reshape(images.shape)


@lru_cache(SEVERITIES)
def _zooming(height: int, width: int, stop: float, step: float) -> Any:
    """The blur as a sparse matrix `[pixels, pixels]`, for all images of a size."""
    from scipy import sparse  # type: ignore[import-untyped]

    factors = np.arange(1, stop, step)
    total = sparse.identity(height * width, np.float32, "csr")
    for factor in factors:
        total += sparse.kron(_enlarging(height, factor), _enlarging(width, factor), "csr")
    return (total / (len(factors) + 1)).astype(np.float32)


def _enlarging(length: int, factor: float) -> Any:
    """Enlargement of an axis as a sparse matrix."""
    from scipy import sparse

    low, high, share = _between(length, factor)
    rows, columns = np.tile(np.arange(length), 2), np.concatenate((low, high))
    weights = np.concatenate((1 - share, share))
    return sparse.csr_array((weights, (rows, columns)), (length, length))


def _enlarged(images: np.ndarray, factor: float) -> np.ndarray:
    """The middle of the images, `factor` times as large, by linear interpolation."""
    for axis in (1, 2):
        low, high, share = _between(images.shape[axis], factor)
        share = share.reshape((-1,) + (1,) * (3 - axis))
        images = images.take(low, axis) * (1 - share) + images.take(high, axis) * share
    return images


@cache
def _between(length: int, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel of an enlarged axis, the two between which it is, and the second's share.

    As `scipy.ndimage.zoom`, the first and last pixel of the part that is enlarged keep their value.
    """
    part = int(np.ceil(length / factor))
    size = max(length, round(part * factor))
    places = np.arange(length) + (size - length) // 2
    at = (length - part) // 2 + places * ((part - 1) / max(1, size - 1))
    low = np.floor(at + 1e-9).astype(int)
    share = np.clip(at - low, 0, 1).astype(np.float32)
    return low, np.minimum(low + 1, length - 1), share


# Weather


def _snow(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """Whitened image with smeared flakes.

    Mean and standard deviation of the noise that becomes flakes, its enlargement, the threshold
    below which there is none, radius and sigma of the smear, and the share of the image that is not
    whitened.
    """
    mean, deviation, enlargement, threshold, radius, sigma, kept = parameters
    height, width = images.shape[1:3]
    noise = _drawn(draws, lambda of: of.normal(mean, deviation, (height, width, 1)))
    flakes = _enlarged(noise, enlargement)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    smears = [
        _smeared(flake, radius, sigma, of.uniform(-135, -45))
        for flake, of in zip(flakes, draws, strict=True)
    ]
    layer = 255 * np.stack(smears)
    grey = images if images.shape[3] == 1 else (images @ GREY)[..., None]
    whitened = np.maximum(images, 1.5 * grey + 127.5)
    return kept * images + (1 - kept) * whitened + layer + layer[:, ::-1, ::-1]


def _frost(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """A texture like frost added to the image; the weights of the image and of the texture.

    The authors take parts of five photographs. The texture here is a folded plasma fractal, whose
    creases are like the edges of crystals, with the mean colour and the standard deviation of one
    of those photographs; its differences between near pixels are like theirs. See
    experiments/agreement/corruptions.md.
    """
    kept, laid = parameters
    height, width, channels = images.shape[1:]
    kinds = np.array([of.randint(len(FROSTS)) for of in draws], int)
    shifts = _drawn(draws, lambda of: of.normal(0, FROST_SHIFT, (1, 1, 1)))
    land = _plasma(max(height, width), FROST_DECAY, draws)[:, :height, :width, None]
    folds = -np.abs(land - land.mean(axis=(1, 2), keepdims=True))
    folds -= folds.mean(axis=(1, 2), keepdims=True)
    folds /= np.maximum(folds.std(axis=(1, 2), keepdims=True), 1e-9)
    looks = FROSTS[kinds][:, None, None]
    texture = np.clip(looks[..., :3] + looks[..., 3:] * folds + shifts, 0, 255)
    return kept * images + laid * (texture if channels == 3 else (texture @ GREY)[..., None])


def _fog(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """A plasma fractal laid over the image; its strength, and how fast its details fade."""
    strength, decay = parameters
    height, width = images.shape[1:3]
    layer = 255 * strength * _plasma(max(height, width), decay, draws)[:, :height, :width, None]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    return (images + layer) * brightest / np.maximum(brightest + 255 * strength, 1)


def _plasma(side: int, decay: float, draws: Draws) -> np.ndarray:
    """Random landscapes from 0 to 1 by the diamond-square algorithm, `[n, size, size]`.

    `size` is the next power of two from `side` on, and the sides join. Each point is the mean of
    its four neighbours at the scale plus uniform noise that shrinks by the square of `decay` from a
    scale to the next.
    """
    size = 1 << (side - 1).bit_length()
    noise = _drawn(draws, lambda of: of.uniform(-1, 1, (size, size)))
    land = np.zeros_like(noise)
    step, height = size, 1.0
    while step > 1:
        half = step // 2
        at, middle = slice(0, None, step), slice(half, None, step)
        corners = land[:, at, at]
        pairs = corners + np.roll(corners, -1, 2)
        land[:, middle, middle] = (pairs + np.roll(pairs, -1, 1)) / 4
        land[:, middle, middle] += height * noise[:, middle, middle]
        centres = land[:, middle, middle]
        land[:, at, middle] = (pairs + centres + np.roll(centres, 1, 1)) / 4
        columns = corners + np.roll(corners, -1, 1)
        land[:, middle, at] = (columns + centres + np.roll(centres, 1, 2)) / 4
        land[:, at, middle] += height * noise[:, at, middle]
        land[:, middle, at] += height * noise[:, middle, at]
        step, height = half, height / decay**2
    land -= land.min(axis=(1, 2), keepdims=True)
    return land / np.maximum(land.max(axis=(1, 2), keepdims=True), 1e-9)


# Light and colour


def _brightness(images: np.ndarray, parameters: float) -> np.ndarray:
    """The value of HSV, which is the largest channel, raised; by how much, from 0 to 1."""
    value = images.max(axis=-1, keepdims=True)
    raised = np.minimum(value + 255 * parameters, 255)
    return np.where(value > 0, images * (raised / np.maximum(value, 1)), raised)


def _contrast(images: np.ndarray, parameters: float) -> np.ndarray:
    """Differences from the mean of each channel shrunk; by what factor."""
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    return mean + parameters * (images - mean)


# Geometry and coding


def _elastic_transform(images: np.ndarray, parameters: tuple, draws: Draws) -> np.ndarray:
    """A random affine map, then a smooth random displacement.

    As shares of the shorter side: the factor of the displacement, the sigma of its smoothing, and
    the largest move of the three points that make the affine map. Places are rounded to 1/32 pixel
    (OpenCV).
    """
    import cv2

    factor, sigma, largest = (share * min(images.shape[1:3]) for share in parameters)
    height, width = images.shape[1:3]
    middle, third = np.array((width // 2, height // 2)), min(height, width) // 3
    points = (middle + third * np.array(((1, 1), (1, -1), (-1, -1)))).astype(np.float32)
    shifts = _drawn(draws, lambda of: of.uniform(-largest, largest, (3, 2)))
    noise = _drawn(draws, lambda of: of.uniform(-1, 1, (2, height, width)))
    moves = factor * (_smoothing(height, sigma) @ noise @ _smoothing(width, sigma).T)
    x, y = moves[:, 0] + np.arange(width, dtype=np.float32), moves[:, 1]
    y = y + np.arange(height, dtype=np.float32)[:, None]
    out = np.empty_like(images)
    for place, image in enumerate(images):
        matrix = cv2.getAffineTransform(points, points + shifts[place])
        turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        moved = cv2.remap(turned, x[place], y[place], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
        out[place] = moved.reshape(image.shape)
    return out


@cache
def _smoothing(length: int, sigma: float) -> np.ndarray:
    """The Gaussian blur of an axis, mirrored at its ends, as a matrix: sigma may be large."""
    from scipy.ndimage import gaussian_filter

    every = gaussian_filter(np.eye(length), (sigma, 0), mode="reflect", truncate=3)
    return every.astype(np.float32)


def _pixelate(images: np.ndarray, parameters: float) -> np.ndarray:
    """Scaled down, by what factor, and up again."""
    height, width = images.shape[1:3]
    small = max(1, int(width * parameters)), max(1, int(height * parameters))

    def scaled(image: Image.Image) -> Image.Image:
        down = image.resize(small, Image.Resampling.BOX)
        return down.resize((width, height), Image.Resampling.BOX)

    return _by_pillow(images, scaled)


def _jpeg_compression(images: np.ndarray, parameters: int) -> np.ndarray:
    """Saved as JPEG; its quality."""

    def saved(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=parameters)
        return Image.open(file)

    return _by_pillow(images, saved)


def _by_pillow(images: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    grey = images.shape[3] == 1
    pixels = images.astype(np.uint8)
    made = [operation(Image.fromarray(image[..., 0] if grey else image)) for image in pixels]
    return np.stack([np.asarray(image) for image in made]).reshape(images.shape)


def _draws(*key: int) -> RandomState:
    """Random numbers that no version of NumPy changes; PCG64 is the quickest to start."""
    return RandomState(PCG64(SeedSequence(key)))


def _drawn(draws: Draws, draw: Callable[[RandomState], np.ndarray]) -> np.ndarray:
    """What `draw` takes from the random numbers of each image, `[n, ...]` float32."""
    return np.stack([draw(of).astype(np.float32) for of in draws])


RANDOM: dict[str, Callable[[np.ndarray, Any, Draws], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "elastic_transform": _elastic_transform,
}
FIXED: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "defocus_blur": _defocus_blur,
    "zoom_blur": _zoom_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


# Bad input


def _check_name(name: str, severity: int) -> None:
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}{nearest(name, CORRUPTIONS)}")
    if severity not in range(1, SEVERITIES + 1):
        raise ValueError(f"severity is {severity}, expected a whole number from 1 to {SEVERITIES}")


def _check_images(images: np.ndarray) -> None:
    shape, kind = images.shape, images.dtype
    if images.ndim != 4 or shape[3] not in (1, 3) or 0 in shape[1:] or kind != np.uint8:
        raise ValueError(
            f"images are {list(shape)} {kind}, expected [images, height, width, 1 or 3] uint8: add "
            "the axis that is missing, and bring the values to 0..255"
        )


def _table(name: str | None, sides: tuple[int, ...]) -> dict[str, tuple]:
    name = name or ("cifar" if max(sides) <= SMALL else "imagenet")
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}{nearest(name, TABLES)}")
    return TABLES[name]


def _checked_errors(
    errors: Mapping[str, Rates], clean: float, reference: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The error rates as arrays; raises for what cannot be error rates of these corruptions."""
    if not errors or set(errors) != set(reference):
        odd = sorted(set(errors) ^ set(reference)) or ["all of them"]
        raise ValueError(
            f"expected the errors of {', '.join(reference) or 'some corruptions'}; missing or "
            f"unknown: {', '.join(odd)}"
        )
    found = {name: np.asarray(rates, float) for name, rates in errors.items()}
    for name, rates in {**found, "clean images": np.full(SEVERITIES, clean)}.items():
        if rates.shape != (SEVERITIES,):
            raise ValueError(f"{name} has errors of shape {rates.shape}, expected {SEVERITIES}")
        if not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(
                f"errors on {name} are {rates.tolist()}, expected shares from 0 to 1: divide "
                "percentages by 100"
            )
    return found
