"""AutoAugment and RandAugment: each operation beside Pillow's, and what is drawn."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from supcon_jax.data import randaugment as ra

FLOWER, CHINA = (load_sample_image(name) for name in ("flower.jpg", "china.jpg"))
PHOTOS = {  # uint8: odd sides, and 32 x 32 of one channel, which has many pixels of the same value
    "odd": np.ascontiguousarray(FLOWER[50:350:8, 160:556:8][:37, :49]),
    "dark": np.ascontiguousarray(CHINA[40:364:6, 100:496:6][:37, :49] // 3 + 7),
    "grey": np.ascontiguousarray(CHINA[100:356:8, 100:356:8, :1] // 2 + 40),
}
each_photo = pytest.mark.parametrize("photo", PHOTOS)
# 20 x 20, enough for Equalize, which needs over 255 pixels; neither 0 nor 255.
PATCH = (FLOWER[120:200:4, 250:330:4] * 0.8 + 20).astype(np.uint8)

ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
FACTORS = (0.0, 0.1, 0.46, 1.0, 1.36, 1.9)
ARGUMENTS = {
    "Identity": (0,),
    "AutoContrast": (0,),
    "Equalize": (0,),
    "Invert": (0,),
    "Rotate": (-30, -17.3, -3, 0, 9, 30),
    "Posterize": (0, 1, 2, 4, 8),
    "Solarize": (0, 76, 128, 204, 256),
    **dict.fromkeys(ENHANCERS, FACTORS),
    "ShearX": (-0.3, 0, 0.11, 0.3),
    "ShearY": (-0.3, 0, 0.11, 0.3),
    "TranslateX": (-1.1, -0.44, 0, 0.13),
    "TranslateY": (-1.1, -0.44, 0, 0.13),
    "Cutout": (0, 0.09, 0.18, 2),
    "SolarizeAdd": (0, 33, 110, 140),
}
CASES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
# Levels of 255 by which we may differ from Pillow, which rounds in between; all others are equal.
LEVELS = dict(AutoContrast=1)
BATCH = 64
TIES = 0.005  # share of pixels that may come from the neighbour: Pillow has 16-bit fractions


def run(pixels, cases, signs=1, centres=(4, 9), function=ra.apply):
    """One `(operation, argument)` an image, `[n, h, w, c]`; compiled once for each shape."""
    operations = ra.stack([ra.OPERATIONS[name](argument) for name, argument in cases])
    signs = np.broadcast_to(np.float32(signs), len(cases))
    centres = np.broadcast_to(np.float32(centres), (len(cases), 2))
    arguments = (pixels, operations, signs, centres)
    results = []
    for start in range(0, len(cases), BATCH):
        places = np.minimum(np.arange(start, start + BATCH), len(cases) - 1)
        part = jax.tree.map(lambda x, places=places: np.asarray(x)[places], arguments)
        results.append(mapped(function)(*part))
    return np.concatenate(results)[: len(cases)]


@cache
def mapped(function):
    return jax.jit(jax.vmap(function))


@cache
def made(photo):
    """`{case: what it makes of the photo}`."""
    pixels = np.repeat(PHOTOS[photo][None], len(CASES), axis=0)
    return dict(zip(CASES, run(pixels, CASES), strict=True))


def as_image(pixels):
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def by_pillow(name, argument, pixels):
    image = as_image(pixels)
    width, height = image.size
    affine = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * height),
    }
    fill = (128,) * pixels.shape[-1] if pixels.shape[-1] > 1 else 128
    if name in ENHANCERS:
        image = ENHANCERS[name](image).enhance(argument)
    elif name in affine:
        image = image.transform(image.size, Image.Transform.AFFINE, affine[name], fillcolor=fill)
    elif name == "Rotate":
        image = image.rotate(argument, fillcolor=fill)
    elif name in ("Posterize", "Solarize"):
        image = getattr(ImageOps, name.lower())(image, argument)
    else:
        image = getattr(ImageOps, name.lower())(image)
    return np.asarray(image).reshape(pixels.shape)


# Each operation.


@each_photo
@pytest.mark.parametrize(
    "name", sorted(set(ARGUMENTS) - {*GEOMETRIC, "Identity", "Cutout", "SolarizeAdd"})
)
def test_colours_equal_pillow(photo, name):
    for argument in ARGUMENTS[name]:
        if (name, argument) == ("Posterize", 0):  # which Pillow refuses
            expected = np.zeros_like(PHOTOS[photo])
        else:
            expected = by_pillow(name, argument, PHOTOS[photo])
        difference = np.abs(made(photo)[name, argument].astype(int) - expected)
        assert difference.max() <= LEVELS.get(name, 0), argument
        assert (difference > 0).mean() < 0.01


@each_photo
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_equals_pillow(photo, name):
    for argument in ARGUMENTS[name]:
        expected = by_pillow(name, argument, PHOTOS[photo])
        different = (made(photo)[name, argument] != expected).any(-1)
        assert different.mean() <= TIES, argument


@each_photo
def test_solarize_add_adds_below_128(photo):
    pixels = PHOTOS[photo].astype(int)
    for addition in ARGUMENTS["SolarizeAdd"]:
        expected = np.where(pixels < 128, np.minimum(pixels + addition, 255), pixels)
        np.testing.assert_array_equal(made(photo)["SolarizeAdd", addition], expected)


@each_photo
def test_cutout_is_a_square_around_its_centre(photo):
    for share in ARGUMENTS["Cutout"]:
        expected = PHOTOS[photo].copy()
        half = int(share * len(expected))
        expected[max(0, 4 - half) : 4 + half, max(0, 9 - half) : 9 + half] = 128
        np.testing.assert_array_equal(made(photo)["Cutout", share], expected)


@each_photo
@pytest.mark.parametrize(
    "case",
    [("Identity", 0), ("Posterize", 8), ("Solarize", 256), ("SolarizeAdd", 0), ("Cutout", 0)]
    + [(name, 0) for name in GEOMETRIC]
    + [(name, 1.0) for name in ENHANCERS],
)
def test_nothing_happens_at_the_argument_of_the_identity(photo, case):
    np.testing.assert_array_equal(made(photo)[case], PHOTOS[photo])


@each_photo
def test_every_other_operation_changes_the_photo(photo):
    for name in set(ARGUMENTS) - {"Identity"}:
        if (photo, name) != ("grey", "Color"):
            changed = [(made(photo)[name, x] != PHOTOS[photo]).any() for x in ARGUMENTS[name]]
            assert any(changed), name


def test_negative_sign_turns_the_geometry_round():
    cases = [(name, x) for name in GEOMETRIC for x in ARGUMENTS[name]]
    pixels = np.repeat(PHOTOS["odd"][None], len(cases), axis=0)
    turned = run(pixels, cases, signs=-1)
    expected = run(pixels, [(name, -argument) for name, argument in cases])
    np.testing.assert_array_equal(turned, expected)


def test_an_image_of_one_value_stays_under_statistics():
    """Of black, white and grey, as in Pillow; also where one channel alone is constant."""
    flat = np.stack([np.full((20, 20, 3), value, np.uint8) for value in (0, 93, 255)])
    flat = np.concatenate([flat, flat])
    flat[3:, ..., 0] = np.arange(400).reshape(20, 20) // 2
    for name in ("AutoContrast", "Equalize"):
        changed = run(flat, [(name, 0)] * 6)
        np.testing.assert_array_equal(changed, [by_pillow(name, 0, pixels) for pixels in flat])
        np.testing.assert_array_equal(changed[..., 1:], flat[..., 1:])


def test_all_branches_at_once_are_each_branch_alone():
    """The way of accelerators, where `vmap` computes all and the histogram is another."""
    count = len(CASES)
    at_once = partial(ra._apply, histogram=ra.histogram_by_bits)
    for photo, pixels in PHOTOS.items():
        results = run(np.repeat(pixels[None], count, axis=0), CASES, function=at_once)
        for case, result in zip(CASES, results, strict=True):
            np.testing.assert_array_equal(result, made(photo)[case])


@pytest.mark.parametrize("histogram", [ra.histogram_by_scatter, ra.histogram_by_bits])
@pytest.mark.parametrize("shape", [(37, 49, 3), (32, 32, 1), (1, 5, 3), (64, 40, 2)])
def test_histograms_count(histogram, shape):
    pixels = np.resize(np.concatenate([FLOWER[::9, ::9].ravel(), np.arange(256)]), shape)
    pixels = pixels.astype(np.uint8)
    expected = [np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(pixels, -1, 0)]
    np.testing.assert_array_equal(histogram(jnp.asarray(pixels)), expected)


# Levels and tables.


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, dict(Rotate=0, ShearX=0, TranslateY=0, Cutout=0, Color=0.1, Posterize=1, Solarize=0)),
        (3, dict(Rotate=9, ShearY=0.09, TranslateX=30 / 224, Cutout=12 / 224, Sharpness=0.64)),
        (3, dict(Posterize=1, Solarize=76, SolarizeAdd=33)),
        (10, dict(Rotate=30, ShearX=0.3, TranslateY=100 / 224, Cutout=40 / 224, Contrast=1.9)),
        (10, dict(Posterize=4, Solarize=256, SolarizeAdd=110, Brightness=1.9)),
    ],
)
def test_levels_of_the_authors_code(level, expected):
    arguments = ra.rand_arguments(level)
    assert {name: arguments[name] for name in expected} == pytest.approx(expected)
    moved = ra.imagenet_arguments(level)
    assert moved["TranslateX"] == pytest.approx(level / 10 * 250 / 224)
    assert {**moved, "TranslateX": 0, "TranslateY": 0} == {
        **arguments,
        "TranslateX": 0,
        "TranslateY": 0,
    }


def test_levels_of_the_cifar_table_span_the_ranges_of_the_paper():
    lowest, highest = ra.cifar_arguments(0), ra.cifar_arguments(9)
    for name, low, high in (
        ("ShearX", 0, 0.3),
        ("ShearY", 0, 0.3),
        ("TranslateX", 0, 150 / 331),
        ("TranslateY", 0, 150 / 331),
        ("Rotate", 0, 30),
        ("Solarize", 256, 0),
        ("Posterize", 8, 4),
        *((name, 0.1, 1.9) for name in ENHANCERS),
    ):
        assert (lowest[name], highest[name]) == pytest.approx((low, high))


def test_a_hole_of_40_pixels_has_a_side_of_80_at_224():
    pixels = np.full((1, 224, 224, 1), 7, np.uint8)
    case = ("Cutout", ra.rand_arguments(10)["Cutout"])
    assert (run(pixels, [case], centres=(100, 100)) == 128).sum() == 80 * 80


# As printed in the authors' code, https://github.com/tensorflow/models (official/vision/ops).
PUBLISHED = """
    Equalize .8 1 ShearY .8 4       Color .4 9 Equalize .6 3        Color .4 1 Rotate .6 8
    Solarize .8 3 Equalize .4 7     Solarize .4 2 Solarize .6 2     Color .2 0 Equalize .8 8
    Equalize .4 8 SolarizeAdd .8 3  ShearX .2 9 Rotate .6 8         Color .6 1 Equalize 1 2
    Invert .4 9 Rotate .6 0         Equalize 1 9 ShearY .6 3        Color .4 7 Equalize .6 0
    Posterize .4 6 AutoContrast .4 7  Solarize .6 8 Color .6 9      Solarize .2 4 Rotate .8 9
    Rotate 1 7 TranslateY .8 9      ShearX 0 0 Solarize .8 4        ShearY .8 0 Color .6 4
    Color 1 0 Rotate .6 2           Equalize .8 4 Equalize 0 8      Equalize 1 4 AutoContrast .6 2
    ShearY .4 7 SolarizeAdd .6 7    Posterize .8 2 Solarize .6 10   Solarize .6 8 Equalize .6 1
    Color .8 6 Rotate .4 5
"""


def test_the_imagenet_table_is_the_published_one():
    words = iter(PUBLISHED.split())
    steps = [(name, float(next(words)), int(next(words))) for name in words]
    assert [step for pair in ra.IMAGENET for step in pair] == steps
    assert len(ra.IMAGENET) == 25


def test_the_cifar_table_is_complete():
    assert len(ra.CIFAR) == 25 and len(set(ra.CIFAR)) == 25
    for place, pair in (
        (0, (("Invert", 0.1, 7), ("Contrast", 0.2, 6))),
        (5, (("ShearY", 0.2, 7), ("Posterize", 0.3, 7))),
        (13, (("Brightness", 0.9, 6), ("Color", 0.2, 8))),
        (24, (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1))),
    ):
        assert ra.CIFAR[place] == pair
    for name, probability, level in itertools.chain(*ra.CIFAR):
        assert name in ra.OPERATIONS and 0 <= probability < 1 and 0 <= level <= 9


# What is drawn.


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@cache
def compiled(policy, **options):
    return jax.jit(jax.vmap(partial(policy, **options)))


def draw(policy, images, keys, **options):
    """What the policy makes of 8-bit images, in 8 bits; compiled once for its options."""
    parts = [slice(start, start + 1000) for start in range(0, len(images), 1000)]
    function = compiled(policy, **options)
    made = np.concatenate([function(keys[x], np.float32(images[x]) / 255) for x in parts]) * 255
    np.testing.assert_allclose(made, np.round(made), atol=1e-4)
    return np.round(made).astype(np.uint8)


def outcomes(pixels, cases):
    """`[cases, signs, ...]`: all that each may make of the image, but for the place of a hole."""
    repeated = np.repeat(pixels[None], 2 * len(cases), axis=0)
    changed = run(repeated, [case for case in cases for _ in range(2)], [1, -1] * len(cases))
    return changed.reshape(len(cases), 2, *pixels.shape)


def shares_of(images):
    """`{image as bytes: share}`."""
    count = len(images)
    found = {}
    for image in images:
        found[image.tobytes()] = found.get(image.tobytes(), 0) + 1 / count
    return found


def assert_shares(found, expected, count):
    """All that was found was expected, as often as it was, to five standard deviations."""
    assert set(found) <= set(expected)
    for image, share in expected.items():
        deviation = math.sqrt(share * (1 - share) / count)
        assert abs(found.get(image, 0) - share) < 5 * deviation + 1 / count


def test_rand_augment_draws_each_of_17_operations_and_both_signs_equally_often():
    count, arguments = 4000, ra.rand_arguments(7)
    names = [name for name in ra.RAND_OPERATIONS if name != "Cutout"]
    assert len(names) == 16
    possible = outcomes(PATCH, [(name, arguments.get(name, 0)) for name in names])
    expected = shares_of(possible.reshape(-1, *PATCH.shape))
    assert len(expected) == 16 + len(GEOMETRIC)
    expected = {image: share * 16 / 17 for image, share in expected.items()}
    images = np.repeat(PATCH[None], count, axis=0)
    drawn = draw(ra.rand_augment, images, keys_of(count), layers=1, magnitude=7)
    holes = [image for image in drawn if image.tobytes() not in expected]
    assert_shares({"hole": len(holes) / count}, {"hole": 1 / 17}, count)
    rest = {image: share for image, share in shares_of(drawn).items() if image in expected}
    assert_shares(rest, expected, count)
    half = int(arguments["Cutout"] * 20)
    for image in holes:
        changed = (image != PATCH).any(-1)
        assert (image[changed] == 128).all() and 0 < changed.sum() <= (2 * half) ** 2
    assert len(shares_of(holes)) > 150  # of 400 places


def test_rand_augment_applies_layer_after_layer():
    """Every image is one of the 17 x 17 pairs in order, but for those with a hole."""
    arguments = ra.rand_arguments(7)
    cases = [(name, arguments.get(name, 0)) for name in ra.RAND_OPERATIONS if name != "Cutout"]
    once = np.unique(outcomes(PATCH, cases).reshape(-1, *PATCH.shape), axis=0)
    pairs = [(image, case, sign) for image in once for case in cases for sign in (1, -1)]
    images, second, signs = zip(*pairs, strict=True)
    possible = set(shares_of(run(np.stack(images), second, signs)))
    images = np.repeat(PATCH[None], 1000, axis=0)
    drawn = draw(ra.rand_augment, images, keys_of(1000, seed=1), layers=2, magnitude=7)
    share = np.mean([image.tobytes() in possible for image in drawn])
    assert abs(share - (16 / 17) ** 2) < 0.05  # five standard deviations
    assert len(shares_of(drawn)) > 250


@pytest.mark.parametrize("table", ["imagenet", "cifar"])
def test_auto_augment_draws_a_pair_and_applies_each_of_it_with_its_probability(table):
    """Every image that may come, with its probability, from all branches of all 25 pairs."""
    pairs, arguments = ra.TABLES[table]
    count, expected = 5000, {}

    def branches(probability, images, step):
        name, applied, level = step
        case = (name, arguments(level).get(name, 0))
        repeated = np.repeat(images, 2, axis=0)
        changed = run(repeated, [case] * len(repeated), [1, -1] * len(images))
        return (
            np.concatenate([probability * (1 - applied), np.repeat(probability, 2) * applied / 2]),
            np.concatenate([images, changed]),
        )

    for first, second in pairs:
        probability, images = np.full(1, 1 / 25), PATCH[None]
        for step in (first, second):
            probability, images = branches(probability, images, step)
        for share, image in zip(probability, images, strict=True):
            expected[image.tobytes()] = expected.get(image.tobytes(), 0) + share
    assert sum(expected.values()) == pytest.approx(1)
    drawn = draw(
        ra.auto_augment, np.repeat(PATCH[None], count, axis=0), keys_of(count), table=table
    )
    assert_shares(shares_of(drawn), {x: share for x, share in expected.items() if share}, count)


@pytest.mark.parametrize(
    "policy",
    [
        partial(draw, ra.rand_augment, layers=2, magnitude=7),
        partial(draw, ra.auto_augment, table="imagenet"),
    ],
    ids=["rand", "auto"],
)
def test_same_key_same_result_whatever_the_batch(policy):
    images = np.stack([PATCH, PATCH[::-1], PATCH[:, ::-1], 255 - PATCH] * 250)
    keys = keys_of(1000)
    whole = policy(images, keys)
    np.testing.assert_array_equal(policy(images[::-1], keys[::-1])[::-1], whole)
    assert (policy(images, keys_of(1000, seed=1)) != whole).any((1, 2, 3)).mean() > 0.5


def test_rand_augment_of_no_layers_rounds_to_8_bits():
    image = jnp.asarray(np.float32([0, 0.4, 0.6, 254.7, 255]).reshape(1, 5, 1) / 255)
    changed = ra.rand_augment(jax.random.key(0), image, layers=0)
    np.testing.assert_allclose(changed * 255, np.float32([0, 0, 1, 255, 255]).reshape(1, 5, 1))


def test_an_unknown_table_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="table must be one of imagenet, cifar; got 'svhn'"):
        ra.auto_augment(jax.random.key(0), jnp.zeros((4, 4, 3)), table="svhn")
