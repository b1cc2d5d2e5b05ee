"""Image operations against Pillow, scipy and colorsys, on parts of two real photographs."""

import colorsys
import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colors
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

from supcon_jax.data import augment

# A tower with sky and a flower, every sixth pixel: [54, 66, 3] uint8.
TOWER = np.ascontiguousarray(load_sample_image("china.jpg")[40:364:6, 100:496:6])
FLOWER = np.ascontiguousarray(load_sample_image("flower.jpg")[40:364:6, 160:556:6])
each_photo = pytest.mark.parametrize("photo", [TOWER, FLOWER], ids=["tower", "flower"])

JITTER = dict(brightness=0.8, contrast=0.8, saturation=1.4, hue=0.4)
ADDITIVE = JITTER | dict(brightness=0.3)
SIDE = 5  # of the hole
CORNERS = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8)


def floats(photo):
    return np.asarray(photo, np.float32) / 255


def patches(channels=3):
    """`[200, 12, 12, channels]`: parts of the photographs, the last two black and white."""
    photos = [
        floats(photo)[12 * y :, 3 * x :]
        for photo in (TOWER, FLOWER)
        for y in range(3)
        for x in range(17)
    ]
    parts = np.stack([part[:12, :12] for part in photos] * 2)[:200, ..., :channels]
    parts[-2:] = np.array([0, 1]).reshape(2, 1, 1, 1)
    return parts


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def crop(key, image, _):
    return augment.random_resized_crop(key, image, size=10)


def shift(key, image, _):
    return augment.random_shift(key, image, pixels=2)


def flip(key, image, probability):
    return augment.random_flip(key, image, probability=probability)


def grey(key, image, probability):
    return augment.random_grey(key, image, probability=probability)


def jitter(key, image, probability):
    return augment.color_jitter(key, image, **JITTER, probability=probability)


def additive(key, image, probability):
    strengths = dict(ADDITIVE, probability=probability)
    return augment.color_jitter(key, image, **strengths, form="tensorflow")


def blur(key, image, probability):
    """Of four patches side by side, because one is too small for more than one tap."""
    four = jnp.tile(image, (2, 2, 1))
    blurred = augment.gaussian_blur(key, four, sigma=(0.5, 2.0), probability=probability)
    return blurred[:12, :12]


def cutout(key, image, _):
    return augment.cutout(key, image, side=SIDE)


@functools.cache
def compiled(operation):
    return jax.jit(jax.vmap(operation, (0, 0, None)))


@pytest.fixture
def run(unchecked):
    """`run(operation, images)`: one key an image; compiled once for all probabilities."""

    def made(operation, images, probability=0.5, keys=None):
        keys = keys_of(len(images)) if keys is None else keys
        parts = [slice(start, start + 200) for start in range(0, len(images), 200)]
        return np.concatenate(
            [compiled(operation)(keys[part], images[part], probability) for part in parts]
        )

    return made


# What all operations have in common.

every_operation = pytest.mark.parametrize(
    "operation", [crop, shift, flip, grey, jitter, additive, blur, cutout]
)


@every_operation
def test_same_key_same_result_and_other_key_other_result(run, operation):
    image = np.repeat(patches()[5:6], 200, axis=0)
    made = run(operation, image)
    np.testing.assert_array_equal(made, run(operation, image))
    assert not np.array_equal(made, run(operation, image, keys=keys_of(200, seed=1)))
    distinct = {crop: 200, shift: 25, flip: 2, grey: 2, jitter: 80, additive: 80, blur: 80}
    distinct[cutout] = 100
    assert len(np.unique(made.reshape(200, -1), axis=0)) >= distinct[operation]


@every_operation
def test_result_does_not_depend_on_the_other_examples_nor_on_the_place(run, operation):
    images, keys = patches(), keys_of(200)
    made = run(operation, images, keys=keys)
    np.testing.assert_allclose(made, run(operation, images[::-1], keys=keys[::-1])[::-1], atol=1e-6)
    others = np.concatenate([images[:50], np.zeros_like(images[50:])])
    np.testing.assert_allclose(made[:50], run(operation, others, keys=keys)[:50], atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "channels"),
    [(x, 3) for x in (crop, shift, flip, grey, jitter, additive, blur, cutout)]
    + [(x, 1) for x in (grey, jitter, additive, blur)],
)
def test_values_stay_between_0_and_1_and_channels_remain(run, operation, channels):
    made = run(operation, patches(channels), probability=1.0)
    assert made.dtype == np.float32 and made.shape[-1] == channels
    assert made.min() >= 0 and made.max() <= 1 + 1e-6  # bilinear weights add up to 1 by rounding
    assert made[:-2].std() > 0.1  # it is still the photograph


@pytest.mark.parametrize("operation", [jitter, additive, blur])
def test_all_examples_at_once_are_one_by_one(run, monkeypatch, operation):
    """What accelerators run: both sides of each `lax.cond`, all branches of each `lax.switch`."""
    expected = run(operation, patches())
    monkeypatch.setattr(augment, "one_by_one", lambda function, at_once=None: at_once or function)
    at_once = jax.jit(jax.vmap(lambda key, image: operation(key, image, 0.5)))
    np.testing.assert_allclose(at_once(keys_of(200), patches()), expected, atol=1e-5)


@pytest.mark.parametrize("operation", [flip, grey, jitter, additive, blur])
def test_probability_is_the_share_of_changed_images(run, operation):
    images = np.repeat(patches()[5:6], 800, axis=0)
    share = {
        p: (run(operation, images, p) != images).any((1, 2, 3)).mean() for p in (0.0, 0.3, 1.0)
    }
    assert share[0.0] == 0 and share[1.0] == 1
    assert abs(share[0.3] - 0.3) < 0.065  # four standard deviations


# Crop.


def ramp(height, width):
    """The image whose pixel (y, x) has the values (x, y): a crop of it tells where it looked."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x, y], axis=-1)


def many_crops(image, count, **options):
    operation = partial(augment.random_resized_crop, **options)
    return np.asarray(jax.jit(jax.vmap(operation, (0, None)))(keys_of(count), image))


def boxes(cropped, height, width):
    """(left, top, right, bottom) of crops of a ramp, from where their pixels looked."""
    across = [_ends(line, width) for line in cropped[:, 0, :, 0]]
    down = [_ends(line, height) for line in cropped[:, :, 0, 1]]
    return np.array(
        [
            (left, top, right, bottom)
            for (left, right), (top, bottom) in zip(across, down, strict=True)
        ]
    )


def _ends(line, side):
    """Pixel q of n looks at start + (q + 0.5) * length / n - 0.5, clipped to the image."""
    inside = (line > 0) & (line < side - 1)
    place = (np.arange(len(line)) + 0.5) / len(line)
    length, start = np.polyfit(place[inside], np.float64(line[inside]) + 0.5, 1)
    np.testing.assert_allclose(start + place * length - 0.5, line, atol=0.5 + 1e-3)
    np.testing.assert_allclose((start + place * length - 0.5)[inside], line[inside], atol=1e-4)
    return start, start + length


def assert_uniform(values, low, high):
    """Inside of [low, high], and spread evenly (Kolmogorov-Smirnov at the level 1e-5)."""
    assert values.min() >= low - 1e-3 and values.max() <= high + 1e-3
    shares = (np.sort(values) - low) / (high - low)
    even = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(shares - even).max() < 2.47 / np.sqrt(len(values))


@pytest.fixture(scope="module")
def crops():
    """400 crops of the tower and their boxes, which are small enough not to be cut."""
    image = np.concatenate([floats(TOWER), ramp(54, 66)], axis=-1)
    made = many_crops(image, 400, size=30, area=(0.08, 0.4), ratio=(0.5, 2.0))
    return made, boxes(made[..., 3:], 54, 66)


def test_crop_parameters_are_those_asked_for(crops):
    left, top, right, bottom = crops[1].T
    width, height = right - left, bottom - top
    share, ratio = width * height / (54 * 66), np.log(width / height)
    across, down = left / (66 - width), top / (54 - height)
    assert_uniform(share, 0.08, 0.4)
    assert_uniform(ratio, np.log(0.5), np.log(2))
    assert_uniform(across, 0, 1)
    assert_uniform(down, 0, 1)
    dependence = np.corrcoef([share, ratio, across, down])[np.triu_indices(4, 1)]
    assert np.abs(dependence).max() < 0.2  # four standard deviations


def test_crop_interpolates_between_the_four_nearest_pixels(crops):
    for made in crops[0][:40]:
        x, y = np.moveaxis(np.float64(made[..., 3:]), -1, 0)
        left, top = np.minimum(x.astype(int), 64), np.minimum(y.astype(int), 52)
        right_share, bottom_share = (x - left)[..., None], (y - top)[..., None]
        upper, lower = (
            (1 - right_share) * floats(TOWER)[rows, left]
            + right_share * floats(TOWER)[rows, left + 1]
            for rows in (top, top + 1)
        )
        expected = (1 - bottom_share) * upper + bottom_share * lower
        np.testing.assert_allclose(made[..., :3], expected, atol=2e-5)


def test_enlarged_crop_equals_pillow(crops):
    """Pillow's bilinear resize of a box is plain interpolation only where it enlarges."""
    enlarged = (crops[1][:, 2:] - crops[1][:, :2] < 30).all(axis=1)
    assert enlarged.sum() > 50
    for made, box in zip(crops[0][enlarged][:20], crops[1][enlarged], strict=False):
        box = tuple(np.clip(box, 0, [66, 54, 66, 54]))
        for channel in range(3):
            plane = Image.fromarray(floats(TOWER)[..., channel])
            expected = plane.resize((30, 30), Image.Resampling.BILINEAR, box=box)
            np.testing.assert_allclose(made[..., channel], expected, atol=2e-4)


def test_crop_of_everything_is_the_identity():
    image = floats(FLOWER)[:, :54, :1]
    made = many_crops(image, 4, size=54, area=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(made, np.broadcast_to(image, made.shape))


def test_crop_sides_are_cut_to_the_image():
    made = many_crops(ramp(20, 60), 400, size=64, area=(1.0, 1.0), ratio=(0.25, 4.0))
    left, top, right, bottom = boxes(made, 20, 60).T
    width, height = right - left, bottom - top
    flat, high = width > 60 - 1e-3, height > 20 - 1e-3
    assert flat.any() and high.any() and (flat | high).all()
    assert min(left.min(), top.min(), (60 - right).min(), (20 - bottom).min()) > -1e-3
    asked = np.where(high, width**2 / (20 * 60), 20 * 60 / height**2)
    assert_uniform(np.log(asked), np.log(0.25), np.log(4))


# Shift, flip, grey.


def test_shift_gives_every_move_equally_often_and_fills_with_zeros(run):
    image = patches()[5]
    made = run(shift, np.repeat(image[None], 2000, axis=0))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    moved = np.stack([padded[y : y + 12, x : x + 12] for y in range(5) for x in range(5)])
    which = (made[:, None] == moved).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(which.sum(axis=1), 1)
    counts = which.sum(axis=0)
    assert counts.min() > 40 and counts.max() < 120  # 80 each, standard deviation 9


def test_flip_mirrors_left_and_right(run):
    np.testing.assert_array_equal(run(flip, patches(), 1.0), patches()[:, :, ::-1])


def test_grey_equals_pillow(run):
    eight_bit = np.round(patches() * 255).astype(np.uint8)
    made = run(grey, patches(), 1.0)
    expected = floats([np.asarray(Image.fromarray(x).convert("L")) for x in eight_bit])
    np.testing.assert_allclose(made[..., 0], expected, atol=0.51 / 255)  # Pillow rounds
    np.testing.assert_array_equal(made, np.repeat(made[..., :1], 3, axis=-1))


def test_grey_leaves_a_single_channel_as_it_is(run):
    np.testing.assert_array_equal(run(grey, patches(1), 1.0), patches(1))


# Blur, cutout.


@pytest.mark.parametrize(("height", "taps"), [(19, 1), (54, 5), (224, 23)])
def test_blur_equals_scipy(unchecked, height, taps):
    photo = load_sample_image("flower.jpg")[100 : 100 + height, 200:266] / np.float32(255)
    sigmas = np.float32([0.1, 0.4, 1.0, 2.0])

    def blurred(key, sigma):
        return augment.gaussian_blur(key, photo, sigma=(sigma, sigma), probability=1.0)

    made = jax.jit(jax.vmap(blurred))(keys_of(4), sigmas)
    for result, sigma in zip(made, sigmas.astype(float), strict=True):
        expected = gaussian_filter(
            photo.astype(float), (sigma, sigma, 0), mode="mirror", radius=(taps // 2, taps // 2, 0)
        )
        np.testing.assert_allclose(result, expected, atol=2e-6)
    assert taps == 1 or np.abs(made[-1] - photo).mean() > 0.01


def test_blur_draws_sigma_evenly():
    """The weights of a pixel and its neighbour have the ratio exp(1 / (2 sigma^2))."""
    impulse = np.zeros((20, 20, 1), np.float32)
    impulse[9, 9] = 1
    made = jax.jit(jax.vmap(partial(augment.gaussian_blur, probability=1.0), (0, None)))(
        keys_of(2000), impulse
    )
    neighbour, itself = np.float64(made[:, 9, 10, 0]), np.float64(made[:, 9, 9, 0])
    assert_uniform(1 / np.sqrt(2 * np.log(itself / neighbour)), 0.1, 2.0)


def test_cutout_fills_a_square_around_every_pixel_equally_often(run):
    """What would be outside of the image is cut off, so that the corners have smaller holes."""
    image = patches()[5]
    made = run(cutout, np.repeat(image[None], 5000, axis=0))
    pixel = np.arange(12)
    near = np.abs(pixel[:, None] - pixel[None]) <= SIDE // 2
    holes = (near[:, None, :, None] & near[None, :, None, :]).reshape(144, 12, 12)
    filled = np.where(holes[..., None], np.float32(0.5), image)
    which = (made[:, None] == filled).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(which.sum(axis=1), 1)
    counts = which.sum(axis=0)
    assert counts.min() > 10 and counts.max() < 70  # 35 each, standard deviation 6


@pytest.mark.parametrize(("side", "rows"), [(4, slice(3, 7)), (1, slice(5, 6)), (0, slice(0))])
def test_cutout_of_even_sides(side, rows):
    """Of `side` pixels from side // 2 above the drawn one, as of the published code."""
    image = jnp.zeros((12, 12, 1))
    filled = jax.vmap(partial(augment.cutout, side=side), (0, None))(keys_of(300), image) == 0.5
    heights = np.asarray(filled).any(axis=(2, 3))
    assert heights.sum(1).max() == side
    assert any(np.array_equal(np.flatnonzero(x), np.arange(12)[rows]) for x in heights)


# Colours.


def coloured():
    """A part of a photograph with pure colours, ties, greys, black and white added."""
    return floats(np.concatenate([FLOWER[10:20, 20:47], CORNERS[None]]))


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.013, 0.1, 0.37, 0.5])
def test_hue_equals_colorsys(turn):
    made = jax.jit(augment.adjust_hue)(coloured(), jnp.float32(turn))
    expected = [[_turned(*pixel, turn) for pixel in row] for row in coloured().astype(float)]
    np.testing.assert_allclose(made, expected, atol=2e-6)


def _turned(red, green, blue, turn):
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)


@pytest.mark.parametrize("turn", [0.0, 1.0, -1.0])
def test_whole_turns_of_the_hue_are_the_identity(turn):
    made = jax.jit(augment.adjust_hue)(coloured(), jnp.float32(turn))
    np.testing.assert_allclose(made, coloured(), atol=2e-6)


def luminance(images):
    if images.shape[-1] == 1:
        return images
    return (images @ np.array([0.299, 0.587, 0.114]))[..., None]


def adjusted(name, images, factors, form="torchvision"):
    """An operation of the colour jitter in float64: images `[n, h, w, c]`, factors `[n]`."""
    factors = factors[:, None, None, None]
    if name == "hue" or (form == "tensorflow" and name == "saturation" and images.shape[-1] == 3):
        hue, saturation, value = np.moveaxis(colors.rgb_to_hsv(images), -1, 0)
        if name == "hue":
            hue = (hue + factors[..., 0]) % 1
        else:
            saturation = np.clip(factors[..., 0] * saturation, 0, 1)
        return colors.hsv_to_rgb(np.stack([hue, saturation, value], -1))
    if form == "tensorflow" and name == "brightness":
        return np.clip(images + factors, 0, 1)
    if form == "tensorflow" and name == "contrast":
        mean = images.mean((1, 2), keepdims=True)
        return np.clip(factors * (images - mean) + mean, 0, 1)
    grey = luminance(images)
    mean = grey.mean((1, 2, 3), keepdims=True)
    other = {"brightness": 0.0, "contrast": mean, "saturation": grey}[name]
    return np.clip(factors * images + (1 - factors) * other, 0, 1)


@each_photo
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.8])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_reference_equals_pillow(photo, factor, name, enhance):
    """To 2 of 255 levels: Pillow rounds the luminance and cuts off the result's fraction."""
    made = adjusted(name, floats(photo).astype(float)[None], np.array([factor]))[0]
    expected = floats(enhance(Image.fromarray(photo)).enhance(factor))
    np.testing.assert_allclose(made, expected, atol=2 / 255)


@pytest.fixture
def factors(run):
    """What the keys draw, `{name: [n]}`, read off images in which nothing is clipped.

    Hue and saturation leave grey images alone, and contrast leaves their mean alone. The width of a
    narrow range of colours is multiplied by all factors but an additive brightness.
    """

    def of(operation, keys, channels):
        repeat = partial(np.broadcast_to, shape=(len(keys), 12, 12, channels))
        grey = repeat(np.linspace(0.36, 0.44, 12, dtype=np.float32).reshape(1, 12, 1, 1))
        after = run(operation, grey, 1.0, keys).astype(float)
        means = after.mean((1, 2, 3))
        widths = after.std((1, 2, 3)) / grey[0].std()
        if operation is additive:
            found = {"brightness": means - grey[0].mean(), "contrast": widths}
            widths = 1.0  # a flat image has no contrast
        else:
            brightness = means / grey[0].mean()
            found = {"brightness": brightness, "contrast": widths / brightness}
        if channels == 3:
            coloured = repeat(np.array([0.42, 0.39, 0.38], np.float32))
            hue = colors.rgb_to_hsv(coloured[0, 0, 0].astype(float))[0]
            pixel = run(operation, coloured, 1.0, keys)[:, 0, 0].astype(float)
            found["saturation"] = np.ptp(pixel, axis=1) / 0.04 / widths
            found["hue"] = (colors.rgb_to_hsv(pixel)[:, 0] - hue + 0.5) % 1 - 0.5
        return found

    return of


@pytest.mark.parametrize("operation", [jitter, additive])
def test_jitter_draws_each_factor_evenly_up_to_its_strength(run, factors, operation):
    images = np.resize(patches()[5], (2000, 12, 12, 3))
    found = factors(operation, keys_of(2000), 3)
    visible = found["saturation"] > 0.05  # else there is no hue
    for name, strength in (ADDITIVE if operation is additive else JITTER).items():
        if name == "hue" or (name == "brightness" and operation is additive):
            assert_uniform(found[name][visible], -strength, strength)
        else:
            assert_uniform(found[name], max(0, 1 - strength), 1 + strength)
    changed = (run(operation, images, 0.5) != images).any((1, 2, 3))
    drawn = np.stack([*found.values(), changed])[:, visible]
    dependence = np.corrcoef(drawn)[np.triu_indices(5, 1)]
    assert np.abs(dependence).max() < 0.1  # four standard deviations


def distances(images, factors, made, orders, form):
    """How far each order of the operations is from what was made: `[orders, n]`."""
    images = images.astype(float)

    def apply(x, name):
        return adjusted(name, x, factors[name], form)

    return [
        np.abs(functools.reduce(apply, order, images) - made).max((1, 2, 3)) for order in orders
    ]


@pytest.mark.parametrize("operation", [jitter, additive])
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_its_operations_in_every_order_equally_often(run, factors, operation, channels):
    """Of one channel, brightness and contrast alone: there is no colour.

    Saturation and hue of HSV, next to each other, are the same in both orders.
    """
    count, found = 8400, factors(operation, keys_of(8400), channels)
    images = np.resize(patches()[:-2], (count, 12, 12, 3))
    images[:, :3, :9] = np.reshape(CORNERS, (3, 9, 3)) / 255
    images = images[..., :channels]
    made = run(operation, images, 0.7, keys_of(count))
    telling = (made != images).any((1, 2, 3))
    form, brighter = ("tensorflow", 0.05) if operation is additive else ("torchvision", 1.2)
    telling &= (found["brightness"] > brighter) & (found["contrast"] > 1.2)  # which clip
    if channels == 3:
        telling &= (found["saturation"] > 1.3) & (np.abs(found["hue"]) > 0.05)
    chosen = {name: values[telling] for name, values in found.items()}
    orders = list(itertools.permutations(chosen))
    weights = np.ones(len(orders))
    if operation is additive and channels == 3:
        orders = [order for order in orders if "saturation hue" not in " ".join(order)]
        weights = np.array([1 + ("hue saturation" in " ".join(order)) for order in orders])
    errors = distances(images[telling], chosen, made[telling], orders, form)
    best, second = np.sort(errors, axis=0)[:2]
    assert best.max() < 1e-4
    clear = second > 1e-3
    assert clear.mean() > 0.9
    assert_as_often_as(np.argmin(errors, axis=0)[clear], weights / weights.sum())


@pytest.mark.parametrize("form", ["torchvision", "tensorflow"])
def test_jitter_of_no_strength_is_the_identity(form):
    image, nothing = coloured(), dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    jitter = partial(augment.color_jitter, **nothing, probability=1.0, form=form)
    made = jax.vmap(jitter, (0, None))(keys_of(8), jnp.asarray(image))
    np.testing.assert_allclose(made, np.broadcast_to(image, made.shape), atol=2e-6)


def test_an_unknown_form_of_jitter_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="form must be one of torchvision, tensorflow; got 'tf'"):
        augment.color_jitter(jax.random.key(0), jnp.asarray(coloured()), **JITTER, form="tf")


def assert_as_often_as(drawn, shares):
    """By the chi-squared test, whose deviation is sqrt(2 * freedom)."""
    expected, freedom = len(drawn) * shares, len(shares) - 1
    assert expected.min() > 10
    times = np.bincount(drawn, minlength=len(shares))
    assert np.sum((times - expected) ** 2 / expected) < freedom + 5 * np.sqrt(2 * freedom)
