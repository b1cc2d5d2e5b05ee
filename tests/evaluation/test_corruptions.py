"""The corruptions against another implementation's record, loops, SciPy and closed forms."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from supcon_jax.data.pipeline import evaluation_batches
from supcon_jax.data.sources import in_memory, open_source, subset
from supcon_jax.evaluation import corruptions
from supcon_jax.evaluation.corruptions import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    CIFAR,
    CORRUPTIONS,
    IMAGENET,
    TABLES,
    accuracy_by_severity,
    corrupt,
    corrupted,
    mean_corruption_error,
)

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "experiments" / "agreement" / "corruptions.json").read_text())
CHINA, FLOWER = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
LARGE = CHINA[None, :224, :224]
MIDDLE = CHINA[None, 150:246, 100:196]
PLACES = ((CHINA, 200, 300), (CHINA, 150, 100), (FLOWER, 200, 300), (FLOWER, 100, 200))
TILES = np.stack([photograph[y : y + 32, x : x + 32] for photograph, y, x in PLACES])
QUARTERS = np.stack(
    [
        np.asarray(Image.fromarray(photograph).resize((160, 106), Image.Resampling.BOX))[
            y : y + 32, x : x + 32
        ]
        for photograph in (CHINA, FLOWER)
        for y in (0, 32, 64)
        for x in (0, 32, 64, 96)
    ]
)
DIGITS = (load_digits().images[:6, ..., None] * 15.9).astype(np.uint8)
RANDOM, FIXED = set(corruptions.RANDOM), set(corruptions.FIXED)


FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


def distance(images, others):
    return np.abs(images.astype(float) - others).mean()


def draws(count, seed=0):
    return [np.random.RandomState([seed, place]) for place in range(count)]


# Against the record of others


def recorded(table, name):
    return [row for row in RECORD["rows"] if (row["table"], row["corruption"]) == (table, name)]


def measured(images, clean):
    pixels = images.astype(float)
    return {
        "mean": pixels.mean(),
        "std": pixels.std(axis=(1, 2, 3)).mean(),
        "step": np.abs(np.diff(pixels, axis=2)).mean(),
        "from_clean": distance(pixels, clean),
    }


def check_statistics(ours, theirs, seeds, slack):
    """The record has theirs' mean and standard deviation over 8 seeds; within 4 standard errors."""
    for measure, value in ours.items():
        mean, deviation = theirs[measure]
        within = 4 * deviation * np.sqrt(1 / seeds + 1 / 8) + slack
        np.testing.assert_allclose(value, mean, atol=within, rtol=0, err_msg=measure)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_large_images_are_as_those_of_an_independent_implementation(name):
    """Of china.jpg; frost, another texture, may be 12 levels further away.

    Without random numbers also every 32nd pixel; JPEG has several decoders.
    """
    for row in recorded("imagenet", name):
        copies = np.repeat(LARGE, 4 if name in RANDOM else 1, axis=0)
        made = corrupt(copies, name, row["severity"])
        slack = 0.3 + 12 * (name == "frost")
        check_statistics(measured(made, copies), row["china"], 4, slack)
        if name in FIXED:
            theirs = np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8).reshape(7, 7, 3)
            within = 1.0 if name == "jpeg_compression" else 0.1
            assert distance(made[0, ::32, ::32], theirs) < within


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_small_images_are_as_those_of_an_independent_implementation(name):
    """Of 24 parts of both photographs; frost and snow differ by design (see the record)."""
    for row in recorded("cifar", name):
        ours = measured(corrupt(QUARTERS, name, row["severity"]), QUARTERS)
        check_statistics(ours, row["theirs"], 1, 0.3 + 4 * (name in ("frost", "snow")))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_parameters_are_those_of_an_independent_implementation(name):
    theirs, ours = RECORD["parameters"][name], IMAGENET[name]
    if name == "zoom_blur":
        ours = [np.arange(1, *zoom) for zoom in ours]
    if name == "elastic_transform":
        ours = 224 * np.array(ours)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12)


# What all have in common


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("table", TABLES)
def test_parts_are_the_whole(name, table, monkeypatch):
    whole = corrupt(TILES, name, 3, seed=5, table=table)
    monkeypatch.setattr(corruptions, "CHUNK", 2 * TILES[0].size)
    np.testing.assert_array_equal(corrupt(TILES, name, 3, seed=5, table=table), whole)
    chosen = np.array([3, 1])
    part = corrupt(TILES[chosen], name, 3, seed=5, indices=chosen, table=table)
    np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_numbers_follow_seed_and_index(name):
    same = TILES[[0, 0]]
    made = corrupt(same, name, 4)
    other = corrupt(same, name, 4, seed=1)
    assert (distance(made[0], made[1]) > 0.3) == (name in RANDOM)
    assert (distance(made, other) > 0.3) == (name in RANDOM)
    moved = corrupt(same, name, 4, indices=np.array([7, 0]))
    np.testing.assert_array_equal(moved[1], made[0])
    np.testing.assert_array_equal(corrupt(same, name, 4), made)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    "images",
    [DIGITS, TILES, CHINA[None, :40, :90], FLOWER[None, :70, :33, :1], TILES[:1, :1, :1]],
    ids=["8x8 grey", "32x32", "40x90", "70x33 grey", "1x1"],
)
def test_any_size_keeps_its_shape(name, images):
    before = images.copy()
    for severity in (1, 5):
        made = corrupt(images, name, severity)
        assert made.shape == images.shape and made.dtype == np.uint8
    if images.shape[1] > 1:
        assert distance(made, images) > 0.05
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_stay_none(name):
    assert corrupt(TILES[:0], name, 1).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"gaussian_noise", "shot_noise",
                                                            "impulse_noise", "frost"}))  # fmt: skip
def test_grey_is_rgb_of_equal_channels(name):
    """Where channels share their random numbers."""
    grey = TILES[..., :1]
    made = corrupt(np.repeat(grey, 3, axis=3), name, 5, table="imagenet")
    expected = corrupt(grey, name, 5, table="imagenet")
    tolerance = 6 if name == "jpeg_compression" else 1
    np.testing.assert_allclose(made, np.repeat(expected, 3, axis=3).astype(int), atol=tolerance)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("table", TABLES)
def test_severity_orders_the_distance_from_clean(name, table):
    """Not all of the authors' parameters are ordered; each step up or down is as theirs is."""
    copies = {"cifar": np.repeat(TILES, 8, axis=0), "imagenet": np.repeat(MIDDLE, 3, axis=0)}
    images = copies[table]
    ours = [distance(corrupt(images, name, s, table=table), images) for s in range(1, 6)]
    theirs = [row["theirs"]["from_clean"] for row in recorded(table, name)]
    clear = 0
    for ((low, deviation), (high, other)), step in zip(
        pairwise(theirs), np.diff(ours), strict=True
    ):
        if abs(high - low) > 4 * (deviation + other):
            assert np.sign(step) == np.sign(high - low)
            clear += 1
    assert ours[0] > 0.3
    assert clear == 4 or name in RANDOM
    assert ours[4] > 1.05 * ours[0] or name == "elastic_transform"


def test_small_images_have_their_own_table():
    for side, table in ((64, "cifar"), (65, "imagenet")):
        images = CHINA[None, 150 : 150 + side, 100:130]
        made = corrupt(images, "contrast", 5)
        np.testing.assert_array_equal(made, corrupt(images, "contrast", 5, table=table))
        shrunk = made.std(axis=(1, 2)) / images.std(axis=(1, 2))
        np.testing.assert_allclose(shrunk, 0.05 if table == "imagenet" else 0.15, atol=0.02)
    assert set(IMAGENET) == set(CIFAR) == set(CORRUPTIONS) == set(ALEXNET_ERRORS)
    assert all(len(of_severity) == 5 for table in TABLES.values() for of_severity in table.values())


# Each corruption


def test_gaussian_noise_has_its_deviation():
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 2) - 127.5
    np.testing.assert_allclose(noise.std(), 0.06 * 255, rtol=0.02)
    np.testing.assert_allclose(noise.mean(), 0, atol=0.3)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03


def test_shot_noise_varies_with_the_light():
    for level in (40, 120):
        grey = np.full((4, 64, 64, 3), level, np.uint8)
        noisy = corrupt(grey, "shot_noise", 1).astype(float)
        np.testing.assert_allclose(noisy.var(), level * 255 / 500, rtol=0.06)
        np.testing.assert_allclose(noisy.mean(), level - 0.5, atol=0.2)


def test_impulse_noise_is_black_or_white():
    made = corrupt(np.full((8, 64, 64, 3), 100, np.uint8), "impulse_noise", 5, table="imagenet")
    values, counts = np.unique(made, return_counts=True)
    np.testing.assert_array_equal(values, [0, 100, 255])
    np.testing.assert_allclose(counts / made.size, [0.135, 0.73, 0.135], atol=0.01)
    alone = (made != 100).sum(axis=3)
    assert (alone == 1).sum() > (alone == 3).sum()  # channels on their own


@pytest.mark.parametrize("parameters", [(3, 0.1), (10, 0.5), (1.5, 0.1)])
def test_defocus_blur_is_the_mean_over_a_disk(parameters):
    image = np.zeros((1, 41, 41, 1), np.float32)
    image[0, 20, 20] = 1000
    made = corruptions._defocus_blur(image, parameters)[0, ..., 0]
    y, x = np.mgrid[-20:21, -20:21]
    area = (y**2 + x**2 <= parameters[0] ** 2).sum()
    np.testing.assert_allclose(made.sum(), 1000, rtol=0.012)
    np.testing.assert_allclose(made[20, 20], 1000 / area, rtol=0.3)
    assert made[np.hypot(y, x) > parameters[0] + 3].max() < 1e-3
    flat = np.full((1, 30, 30, 1), 77, np.float32)
    np.testing.assert_allclose(
        corruptions._defocus_blur(flat, parameters), 0.077 * made.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("parameters", [(0.7, 1, 2), (1.1, 3, 2), (1.5, 4, 1)])
def test_glass_blur_equals_a_loop_over_the_pixels(parameters):
    """In the order of the authors: rows and columns from the last to the first."""
    sigma, reach, times = parameters
    images = CHINA[None, 90:113, 60:89].astype(np.float32)
    blurred = scipy.ndimage.gaussian_filter(images[0], (sigma, sigma, 0), mode="nearest")
    expected = np.floor(blurred + corruptions.SLACK)
    moves = draws(1)[0].randint(-reach, reach, (times, 23, 29, 2))
    for time in range(times):
        for y in range(23 - reach, reach, -1):
            for x in range(29 - reach, reach, -1):
                down, right = moves[time, y, x]
                expected[y, x] = expected[y + down, x + right]
    expected = scipy.ndimage.gaussian_filter(expected, (sigma, sigma, 0), mode="nearest")
    actual = corruptions._glass_blur(images, parameters, draws(1))
    np.testing.assert_allclose(actual[0], expected, atol=1e-3)


@pytest.mark.parametrize("angle", [-45.0, -10.0, 0.0, 30.0, -90.0, -130.0])
def test_motion_blur_equals_a_sum_of_moved_images(angle):
    image = CHINA[90:113, 60:89].astype(np.float32)
    steps = np.arange(13)
    weights = np.exp(-(steps**2) / 18)
    expected = np.zeros_like(image)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down = np.ceil(step * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
        right = np.ceil(step * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
        rows = np.clip(np.arange(23) + down, 0, 22)
        columns = np.clip(np.arange(29) + right, 0, 28)
        expected += weight * image[rows][:, columns]
    actual = corruptions._smeared(image, 6, 3, angle)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.25, 2.5, 4.5])
@pytest.mark.parametrize("side", [32, 51])
def test_enlargement_is_scipys(factor, side):
    image = CHINA[:side, :side].astype(np.float32)
    part = int(np.ceil(side / factor))
    top = (side - part) // 2
    middle = image[top : top + part, top : top + part]
    zoomed = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
    trim = (zoomed.shape[0] - side) // 2
    expected = zoomed[trim : trim + side, trim : trim + side]
    np.testing.assert_allclose(corruptions._enlarged(image[None], factor)[0], expected, atol=0.01)


def test_zoom_blur_is_the_mean_of_the_enlargements():
    images = TILES.astype(np.float32)
    factors = (1, 1.02, 1.04, 1.06)
    expected = (images + sum(corruptions._enlarged(images, f) for f in factors)) / 5
    actual = corruptions._zoom_blur(images, (1.07, 0.02))
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_plasma_equals_a_loop():
    """Diamond-square, point by point, on a square whose sides join."""
    noise = draws(1)[0].uniform(-1, 1, (16, 16)).astype(np.float32)
    land, step, height = np.zeros((16, 16)), 16, 1.0
    while step > 1:
        half = step // 2
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for starts, around in (
            ([(half, half)], diagonal),
            ([(0, half), (half, 0)], straight),
        ):
            for top, left in starts:
                for y in range(top, 16, step):
                    for x in range(left, 16, step):
                        near = [land[(y + dy) % 16, (x + dx) % 16] for dy, dx in around]
                        land[y, x] = sum(near) / 4 + height * noise[y, x]
        step, height = half, height / 1.7**2
    expected = (land - land.min()) / np.ptp(land)
    np.testing.assert_allclose(corruptions._plasma(13, 1.7, draws(1))[0], expected, atol=1e-5)


def test_fog_keeps_the_brightest_and_hides_differences():
    made = corrupt(LARGE, "fog", 5).astype(float)
    assert made.std() < 0.65 * LARGE.std()
    dark = corrupt(np.full((1, 32, 32, 3), 50, np.uint8), "fog", 5)
    assert dark.max() <= 50


@pytest.mark.parametrize(("side", "size"), [(224, "large"), (32, "small")])
def test_frost_is_like_the_photographs(side, size):
    """Deviation and steps of the texture alone, relative, are those of the photographs used."""
    black = np.zeros((120 if size == "small" else 30, side, side, 3), np.float32)
    texture = corruptions._frost(black, (1, 1), draws(len(black)))
    photographs = [RECORD["frosts"][name][size] for name in FROST_FILES]
    colour = np.mean([found["colour"] for found in photographs], axis=0)
    np.testing.assert_allclose(texture.mean(axis=(0, 1, 2)), colour, atol=20)
    deviations = texture.mean(axis=3).std(axis=(1, 2))
    expected = np.mean([found["std"] for found in photographs])
    np.testing.assert_allclose(deviations.mean(), expected, rtol=0.15)
    for step in (1, 4, 16):
        steps = np.abs(texture[:, :, step:] - texture[:, :, :-step]).mean(axis=(1, 2, 3))
        relative = np.mean([found["steps"][str(step)] / found["std"] for found in photographs])
        np.testing.assert_allclose((steps / deviations).mean(), relative, rtol=0.15)


def test_frost_has_the_weights_of_the_authors():
    """Of image and photograph, in make_cifar_c.py."""
    assert CIFAR["frost"] == ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    images = TILES.astype(np.float32)
    texture = corruptions._frost(0 * images, (1, 1), draws(4))
    made = corruptions._frost(images, (0.7, 0.6), draws(4))
    np.testing.assert_allclose(made, 0.7 * images + 0.6 * texture, atol=1e-3)


def test_snow_is_bright():
    for images in (LARGE, TILES):
        made = corrupt(images, "snow", 5).astype(int)
        assert (made >= images.astype(int) - 1).all()
        assert made.mean() > images.mean() + 20
    flat = corrupt(np.full((2, 40, 40, 3), 60, np.uint8), "snow", 3)
    assert flat.std() > 5
    np.testing.assert_array_equal(flat, flat[:, ::-1, ::-1])  # the flakes, and turned about


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_adds_to_the_value_of_hsv(severity):
    hsv = rgb_to_hsv(LARGE / 255.0)
    hsv[..., 2] = np.clip(hsv[..., 2] + IMAGENET["brightness"][severity - 1], 0, 1)
    expected = np.floor(hsv_to_rgb(hsv) * 255 + 1e-3)
    np.testing.assert_allclose(corrupt(LARGE, "brightness", severity), expected, atol=1)
    black = np.zeros((1, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(corrupt(black, "brightness", 5), int(0.3 * 255))


def test_contrast_shrinks_about_the_mean_of_each_channel():
    mean = LARGE.mean(axis=(1, 2), keepdims=True)
    expected = np.floor(mean + 0.2 * (LARGE - mean))
    np.testing.assert_allclose(corrupt(LARGE, "contrast", 3), expected, atol=1)


def test_elastic_transform_moves_pixels_by_its_shares():
    """On ramps of place, the values are the places that the pixels come from."""
    ramp = np.arange(32, dtype=np.float32)
    places = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], (1, 32))], axis=-1)[None]
    images = np.repeat(places, 40, axis=0)
    move = corruptions._elastic_transform(images, (0.1, 0.04, 0.0), draws(40)) - images
    inner = move[:, 6:-6, 6:-6]
    noise = np.stack([of.uniform(-1, 1, (2, 32, 32)) for of in draws(40, seed=9)])
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, 1.28, 1.28), truncate=3)
    np.testing.assert_allclose(inner.std(), 3.2 * smooth.std(), rtol=0.1)
    affine = corruptions._elastic_transform(images, (0, 0, 0.05), draws(40))[:, 6:-6, 6:-6]
    assert np.abs(np.diff(affine, n=2, axis=2)).max() < 0.07  # straight lines stay straight
    assert 0.2 < (affine - images[:, 6:-6, 6:-6]).std() < 2
    still = corruptions._elastic_transform(images, (0, 0, 0), draws(40))
    np.testing.assert_allclose(still, images, atol=0.04)


def test_pixelate_has_blocks():
    made = corrupt(LARGE, "pixelate", 5)[0]
    blocks = made.reshape(56, 4, 56, 4, 3)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    means = LARGE[0].reshape(56, 4, 56, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(made[::4, ::4], means, atol=1)


# Sources


def digits(load_size=8, channels=1):
    return open_source(
        "digits",
        "test",
        name="",
        directory="",
        load_size=load_size,
        channels=channels,
        memory_limit_gb=1,
    )


def test_a_corrupted_source_corrupts_what_is_loaded():
    source = digits()
    made = corrupted(source, "impulse_noise", 4, seed=3)
    chosen = np.array([200, 7, 31])
    images, labels = source.load(chosen)
    found, same = made.load(chosen)
    expected = corrupt(images, "impulse_noise", 4, seed=3, indices=chosen)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(same, labels)
    np.testing.assert_array_equal(made.labels(), source.labels())
    assert (made.size, made.image_shape, made.read) == (source.size, (8, 8, 1), None)
    assert made.name == "digits/test (impulse_noise, severity 4)"
    everything = in_memory(made)
    np.testing.assert_array_equal(everything.load(chosen)[0], expected)


def test_a_corrupted_source_is_evaluated_in_batches():
    source = subset(digits(), np.arange(50), "fifty")
    made = corrupted(source, "fog", 2)
    batches = [batch["image"][:count, 0] for batch, count in evaluation_batches(made, 16)]
    images, _ = source.load(np.arange(50))
    np.testing.assert_array_equal(np.concatenate(batches), corrupt(images, "fog", 2))


def test_a_corrupted_source_crops_first():
    source = digits(load_size=70, channels=3)
    made = corrupted(source, "contrast", 5, crop=66)
    assert made.image_shape == (66, 66, 3)
    chosen = np.arange(3)
    middle = source.load(chosen)[0][:, 2:68, 2:68]
    np.testing.assert_array_equal(made.load(chosen)[0], corrupt(middle, "contrast", 5))
    with pytest.raises(ValueError, match=r"crop 71 does not fit in the images of 70 x 70"):
        corrupted(source, "contrast", 5, crop=71)


# Errors on corrupted images


def test_the_reference_has_100_percent():
    errors = {name: [rate] * 5 for name, rate in ALEXNET_ERRORS.items()}
    found = mean_corruption_error(errors, ALEXNET_CLEAN_ERROR)
    np.testing.assert_allclose(found, (100, 100))
    half = {name: [rate / 2] * 5 for name, rate in ALEXNET_ERRORS.items()}
    np.testing.assert_allclose(mean_corruption_error(half, ALEXNET_CLEAN_ERROR / 2), (50, 50))


def test_mean_corruption_error_equals_its_sums():
    random = np.random.RandomState(0)
    errors = {name: random.uniform(0.3, 0.9, 5) for name in "abc"}
    reference = {name: random.uniform(0.5, 1.0, 5) for name in "cab"}
    of_sums, relative = [], []
    for name in "abc":
        of_sums += [sum(errors[name]) / sum(reference[name])]
        lost = sum(e - 0.2 for e in errors[name])
        relative += [lost / sum(a - 0.35 for a in reference[name])]
    found = mean_corruption_error(errors, 0.2, reference=reference, reference_clean=0.35)
    np.testing.assert_allclose(found, (100 * sum(of_sums) / 3, 100 * sum(relative) / 3))


def test_accuracy_by_severity_is_the_mean_over_corruptions():
    errors = {"snow": [0.1, 0.2, 0.3, 0.4, 0.5], "fog": [0.0, 0.0, 0.1, 0.2, 0.9]}
    np.testing.assert_allclose(accuracy_by_severity(errors), [0.95, 0.9, 0.8, 0.7, 0.3])


# Bad input


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "name", "severity", "options", "message"),
    [
        (TILES, "gausian_noise", 1, {}, "'gausian_noise'; did you mean 'gaussian_noise'"),
        (TILES, "fog", 0, {}, "severity is 0, expected a whole number from 1 to 5"),
        (TILES, "fog", 6, {}, "severity is 6"),
        (TILES, "fog", 1.5, {}, "severity is 1.5"),
        (TILES / 255, "fog", 1, {}, "float64, expected .images, height, width, 1 or 3. uint8"),
        (TILES[0], "fog", 1, {}, r"images are \[32, 32, 3\] uint8"),
        (TILES[..., :2], "fog", 1, {}, "32, 2. uint8"),
        (TILES, "fog", 1, {"indices": np.arange(3)}, "an index for each of 4 images"),
        (TILES, "fog", 1, {"table": "cifra"}, "did you mean 'cifar'"),
        (TILES, "fog", 1, {"seed": -1}, "non-negative"),
    ],
)
def test_bad_input_gets_one_line(images, name, severity, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        corrupt(images, name, severity, **options)
    assert "\n" not in str(raised.value)


def test_bad_sources_are_refused_before_they_are_read():
    with pytest.raises(ValueError, match="unknown corruption 'rain'; there are gaussian_noise"):
        corrupted(digits(), "rain", 1)
    with pytest.raises(ValueError, match="severity is 9"):
        corrupted(digits(), "snow", 9)


@pytest.mark.parametrize(
    ("errors", "clean", "reference", "message"),
    [
        ({}, 0.1, {"fog": 0.5}, "missing or unknown: fog"),
        ({"fog": [0.5] * 5, "smog": [0.5] * 5}, 0.1, {"fog": 0.5}, "missing or unknown: smog"),
        ({"fog": [0.5] * 4}, 0.1, {"fog": 0.5}, r"fog has errors of shape \(4,\), expected 5"),
        ({"fog": [50.0] * 5}, 0.1, {"fog": 0.5}, "divide percentages by 100"),
        ({"fog": [0.5] * 5}, 10.0, {"fog": 0.5}, "errors on clean images are"),
        ({"fog": [0.5] * 5}, 0.1, {"fog": 0.2}, "the reference's error on fog is 0.2"),
    ],
)
def test_bad_errors_get_one_line(errors, clean, reference, message):
    with pytest.raises(ValueError, match=message) as raised:
        mean_corruption_error(errors, clean, reference=reference, reference_clean=0.3)
    assert "\n" not in str(raised.value)
