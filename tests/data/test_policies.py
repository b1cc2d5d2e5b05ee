"""Policies by name, and views: shapes, randomness of their own, the same whatever the batch."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from supcon_jax.data import augment, policies

PHOTO = np.ascontiguousarray(load_sample_image("flower.jpg")[40:340:6, 160:460:6])
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SETTINGS = dict(
    size=8,
    crop_area=(0.3, 1.0),
    crop_ratio=(0.75, 4 / 3),
    shift=1,
    flip=0.5,
    jitter=0.5,
    jitter_probability=0.7,
    jitter_form="tensorflow",
    grey=0.2,
    blur=0.4,
    table="cifar",
    layers=3,
    magnitude=7.0,
    cutout=2,
)
STRENGTHS = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=1.0)


def photographs(count, stored=1):
    """`[count, stored, 12, 12, 3]` uint8: parts of a photograph, all different."""
    places = [(2 * (i // 18), 2 * (i % 18)) for i in range(count * stored)]
    parts = [PHOTO[top : top + 12, left : left + 12] for top, left in places]
    return np.stack(parts).reshape(count, stored, 12, 12, 3)


def keys_of(count):
    return jax.random.split(jax.random.key(0), count)


def make(images, policy_of_each_view, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    operations = partial(policies.make_views, policies=policy_of_each_view, mean=mean, std=std)
    return np.asarray(jax.jit(operations)(keys_of(len(images)), {"image": images}))


def pixels(images):
    return np.float32(images) / 255


def keep(key, image):
    return image


def corner(key, image):
    return image[:8, :8]


@functools.cache
def augmented():
    """Two views, compiled: the first is a crop, the second has other colours."""
    first = [partial(augment.random_resized_crop, size=12)]
    second = [partial(augment.color_jitter, **STRENGTHS)]
    return jax.jit(partial(policies.make_views, policies=[first, second], mean=MEAN, std=STD))


def unique_images(views):
    return len(np.unique(np.asarray(views).reshape(-1, np.prod(views.shape[-3:])), axis=0))


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("stored", [1, "views"])
def test_shapes_and_types(views, stored):
    images = photographs(4, views if stored == "views" else 1)
    made = make(images, [[corner]] * views, mean=MEAN, std=STD)
    assert made.shape == (4, views, 8, 8, 3) and made.dtype == np.float32


def test_views_of_one_stored_image_all_start_from_it():
    images = photographs(5)
    made = make(images, [[keep]] * 3)
    np.testing.assert_allclose(made, np.repeat(pixels(images), 3, axis=1), atol=1e-7)


def test_each_view_starts_from_a_stored_image_of_its_own():
    images = photographs(5, stored=3)
    made = make(images, [[keep]] * 3)
    np.testing.assert_allclose(made, pixels(images), atol=1e-7)


def test_each_view_has_its_own_policy():
    mirror = partial(augment.random_flip, probability=1.0)
    images = photographs(5)
    made = make(images, [[mirror], [keep], []])
    np.testing.assert_allclose(made[:, 0], pixels(images[:, 0, :, ::-1]), atol=1e-7)
    np.testing.assert_allclose(made[:, 1], pixels(images[:, 0]), atol=1e-7)
    np.testing.assert_allclose(made[:, 2], pixels(images[:, 0]), atol=1e-7)


def test_every_operation_of_every_view_of_every_image_has_randomness_of_its_own():
    """The two operations write a random number into a row each."""

    def draw(key, image, *, row):
        return image.at[row].set(jax.random.uniform(key))

    policy = [partial(draw, row=0), partial(draw, row=1)]
    made = make(photographs(6), [policy] * 3)
    assert len(np.unique(made[:, :, :2, 0, 0])) == 6 * 3 * 2


def test_views_depend_on_the_key_of_the_image_and_not_on_the_batch():
    images, keys = photographs(16), keys_of(16)
    whole = augmented()(keys, {"image": images})
    assert unique_images(whole) == 32
    parts = (slice(8), slice(8, 16))
    halves = [augmented()(keys[part], {"image": images[part]}) for part in parts]
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-5)
    order = np.random.RandomState(0).permutation(16)
    shuffled = augmented()(keys[order], {"image": images[order]})
    np.testing.assert_allclose(shuffled, np.asarray(whole)[order], atol=1e-5)


def test_same_image_with_other_keys_gives_other_views():
    same = np.repeat(photographs(1), 16, axis=0)
    made = augmented()(keys_of(16), {"image": same})
    assert unique_images(made) == 32
    again = augmented()(jnp.repeat(keys_of(1), 16), {"image": same})
    assert unique_images(again) == 2


# By name.


def named(policy):
    return {operation.func.__name__: operation.keywords for operation in policy}


CROP = dict(random_resized_crop=dict(size=8, area=(0.3, 1.0), ratio=(0.75, 4 / 3)))
FIRST = CROP | dict(random_shift=dict(pixels=1), random_flip=dict(probability=0.5))
JITTER = dict(
    color_jitter=dict(
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.7, form="tensorflow"
    )
)
GREY_BLUR = dict(random_grey=dict(probability=0.2), gaussian_blur=dict(probability=0.4))
RAND = dict(rand_augment=dict(layers=3, magnitude=7.0))
CONTENTS = {
    "crop_flip": {},
    "sim_augment": JITTER | GREY_BLUR,
    "auto_augment": dict(auto_augment=dict(table="cifar")),
    "rand_augment": RAND,
    "stacked_rand_augment": JITTER | RAND | GREY_BLUR,
}


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_policy_has_its_operations_in_order_with_their_strengths(name):
    expected = FIRST | CONTENTS[name] | dict(cutout=dict(side=2))
    made = policies.make_policy(name, **SETTINGS)
    assert list(named(made).items()) == list(expected.items())
    on_host = policies.make_policy(name, host_crop=True, **SETTINGS)
    assert list(named(on_host)) == list(expected)[1:]


def test_there_are_the_policies_of_the_paper():
    assert set(CONTENTS) == set(policies.POLICIES)


@pytest.mark.parametrize(
    ("setting", "operation"),
    [
        ("shift", "random_shift"),
        ("flip", "random_flip"),
        ("jitter", "color_jitter"),
        ("jitter_probability", "color_jitter"),
        ("grey", "random_grey"),
        ("blur", "gaussian_blur"),
        ("layers", "rand_augment"),
        ("cutout", "cutout"),
    ],
)
def test_a_policy_leaves_out_what_is_switched_off(setting, operation):
    whole = named(policies.make_policy("stacked_rand_augment", **SETTINGS))
    switched_off = {**SETTINGS, setting: type(SETTINGS[setting])(0)}
    left = named(policies.make_policy("stacked_rand_augment", **switched_off))
    assert set(whole) - set(left) == {operation}


def test_everything_off_is_the_image():
    off = dict(flip=0.0, jitter=0.0, grey=0.0, blur=0.0, layers=0)
    policy = policies.make_policy(
        "stacked_rand_augment", size=12, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), **off
    )
    made = make(photographs(4), [policy])
    np.testing.assert_allclose(made, pixels(photographs(4)), atol=1e-7)


@pytest.mark.parametrize(("channels", "height"), [(3, 24), (1, 17)])
def test_the_longest_policy_makes_views_of_its_size(channels, height):
    """The programs of all operations together; 24 pixels are enough for three taps of blur."""
    images = np.repeat(np.repeat(photographs(6), 2, axis=2), 2, axis=3)[:, :, :height, :, :channels]
    settings = {**SETTINGS, "size": 20, "layers": 1}
    policy = policies.make_policy("stacked_rand_augment", **settings)
    made = make(images, [policy], mean=(0.0,) * channels, std=(1.0,) * channels)
    assert made.shape == (6, 1, 20, 20, channels)
    assert made.min() >= 0 and made.max() <= 1 + 1e-6 and unique_images(made) == 6


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("size", 0, "size must be positive; got 0"),
        ("crop_area", (0.0, 1.0), "crop_area must be two shares with 0 < first <= second <= 1"),
        ("crop_area", (0.5, 0.2), "crop_area must be two shares"),
        ("crop_area", (0.5, 1.2), "crop_area must be two shares"),
        ("crop_ratio", (0.0, 1.0), "crop_ratio must be two ratios with 0 < first <= second"),
        ("crop_ratio", (2.0, 1.0), "crop_ratio must be two ratios"),
        ("shift", -1, "shift must be 0 or more pixels; got -1"),
        ("flip", 1.1, "flip must be a probability from 0 to 1; got 1.1"),
        ("jitter", -0.1, "jitter must be from 0 to 2.5"),
        ("jitter", 2.6, "jitter must be from 0 to 2.5"),
        ("jitter_probability", -0.1, "jitter_probability must be a probability"),
        ("jitter_form", "torch", "jitter_form must be one of torchvision, tensorflow; got 'torch'"),
        ("grey", float("nan"), "grey must be a probability from 0 to 1; got nan"),
        ("blur", 2.0, "blur must be a probability"),
        ("table", "svhn", "table must be one of imagenet, cifar; got 'svhn'"),
        ("layers", -1, "layers must be 0 or more operations; got -1"),
        ("magnitude", 10.5, "magnitude must be from 0 to 10; got 10.5"),
        ("magnitude", -1.0, "magnitude must be from 0 to 10; got -1.0"),
        ("cutout", -3, "cutout must be 0 or more pixels; got -3"),
    ],
)
@pytest.mark.parametrize("name", ["crop_flip", "stacked_rand_augment"])
def test_a_setting_that_cannot_be_is_refused(name, setting, value, message):
    """Also where the policy has no use for it: it is a mistake all the same."""
    with pytest.raises(ValueError, match=message):
        policies.make_policy(name, **{**SETTINGS, setting: value})


def test_an_unknown_policy_is_refused_with_those_there_are():
    message = "name must be one of crop_flip, sim_augment, .*; got 'simaugment'"
    with pytest.raises(ValueError, match=message):
        policies.make_policy("simaugment", **SETTINGS)


# Pixels.


def test_normalisation_is_of_each_channel():
    images = photographs(3)
    made = make(images, [[]], mean=MEAN, std=STD)
    for channel in range(3):
        expected = (images[..., channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(made[..., channel], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [(8, slice(2, 10), slice(3, 11)), (5, slice(3, 8), slice(4, 9)), (12, slice(12), slice(1, 13))],
)
def test_center_crop_is_the_middle_of_the_first_stored_image(size, rows, columns):
    images = np.stack([PHOTO[:12, :14], PHOTO[12:24, :14]])[None]
    made = policies.center_crop(jnp.asarray(images), size=size, mean=MEAN, std=STD)
    expected = (PHOTO[:12, :14][rows, columns] / 255 - MEAN) / STD
    np.testing.assert_allclose(made, expected[None], atol=1e-5)
    assert made.dtype == jnp.float32


def test_center_crop_of_one_channel():
    images = photographs(2)[..., :1]
    made = policies.center_crop(jnp.asarray(images), size=12, mean=(0.3,), std=(0.4,))
    np.testing.assert_allclose(made, (images[:, 0] / 255 - 0.3) / 0.4, atol=1e-5)
