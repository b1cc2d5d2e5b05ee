"""Mixing two images: exact shares, boxes inside the image, and what `make_views` does with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from supcon_jax.data import augment, policies

IMAGE, PARTNER = (
    np.float32(load_sample_image(name)[100:292:12, 200:500:12]) / 255
    for name in ("china.jpg", "flower.jpg")
)  # [16, 25, 3]
HEIGHT, WIDTH = IMAGE.shape[:2]
SHARES = np.float32([0, 1e-4, 0.1, 0.25, 0.5, 0.737, 0.999, 1])
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
KEEP = policies.make_policy("crop_flip", size=16, host_crop=True, flip=0.0)
FLIP = policies.make_policy("crop_flip", size=16, host_crop=True, flip=1.0)


def keys_of(count):
    return jax.random.split(jax.random.key(0), count)


def mixed(function, shares, image=IMAGE, partner=PARTNER):
    mapped = jax.jit(jax.vmap(function, (0, None, None, 0)))
    return np.asarray(mapped(keys_of(len(shares)), image, partner, shares))


def masks(shares):
    """The partner's weights `[n, height, width]`."""
    return mixed(augment.cutmix, shares, np.zeros_like(IMAGE), np.ones_like(IMAGE))[..., 0]


def test_mixup_is_the_weighted_sum():
    share = SHARES[:, None, None, None].astype(float)
    expected = share * IMAGE + (1 - share) * PARTNER
    np.testing.assert_allclose(mixed(augment.mixup, SHARES), expected, atol=1e-6)


def test_cutmix_takes_exactly_its_share_of_the_area():
    shares = np.linspace(0, 1, 1001, dtype=np.float32)
    np.testing.assert_allclose(masks(shares).mean((1, 2)), 1 - shares, atol=2e-6)


def test_cutmix_is_what_the_masks_say():
    weight = masks(SHARES)[..., None]
    expected = (1 - weight) * IMAGE + weight * PARTNER
    np.testing.assert_allclose(mixed(augment.cutmix, SHARES), expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
def test_cutmix_cuts_boxes_of_the_images_shape_anywhere_inside(share):
    """Sides sqrt(1 - share) of the image's; only the outermost pixels are covered in part."""
    mask = masks(np.full(1000, share, np.float32))
    rows, columns = mask.max(2), mask.max(1)  # some pixel of each line is covered across
    np.testing.assert_allclose(mask, rows[:, :, None] * columns[:, None], atol=1e-5)
    starts = [places_of(lines, np.sqrt(1 - share)) for lines in (rows, columns)]
    assert abs(np.corrcoef(starts)[0, 1]) < 0.13  # four standard deviations


def places_of(lines, side):
    """Where the boxes start, as shares of the room they have; lines `[n, length]`."""
    length, starts = lines.shape[1], []
    for line in lines:
        touched = np.flatnonzero(line > 1e-5)
        assert (np.diff(touched) == 1).all()
        np.testing.assert_allclose(line[touched[1:-1]], 1, atol=1e-5)
        starts.append(touched[0] + 1 - line[touched[0]])
    np.testing.assert_allclose(lines.sum(1), side * length, atol=1e-4)
    shares = np.sort(starts) / (length * (1 - side))
    assert shares[0] > -1e-4 and shares[-1] < 1 + 1e-4
    even = (np.arange(len(shares)) + 0.5) / len(shares)
    assert np.abs(shares - even).max() < 2.47 / np.sqrt(len(shares))  # Kolmogorov-Smirnov, 1e-5
    return np.array(starts)


@pytest.mark.parametrize("function", [augment.mixup, augment.cutmix])
def test_all_or_nothing(function):
    both = mixed(function, np.float32([1, 0]))
    np.testing.assert_allclose(both, [IMAGE, PARTNER], atol=1e-6)


# In batches.


def batch_of(count):
    """Parts of the photographs, `[count, 2, 16, 16, 3]` uint8, with shares."""
    pixels = np.stack([IMAGE, PARTNER]) * np.float32(255)
    parts = np.stack([np.roll(pixels, 2 * i, axis=2)[:, :, :16] for i in range(count)])
    shares = np.linspace(0.1, 0.9, count, dtype=np.float32)
    return {"image": np.round(parts).astype(np.uint8), "share": shares}


def make(batch, policy, mix, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    views = partial(policies.make_views, policies=policy, mean=mean, std=std, mix=mix)
    return np.asarray(jax.jit(views)(keys_of(len(batch["share"])), batch))


def test_mixup_of_a_batch_is_one_view_of_both_images():
    batch = batch_of(5)
    images = batch["image"].astype(float)
    share = batch["share"].astype(float).reshape(-1, 1, 1, 1)
    expected = (share * images[:, 0] + (1 - share) * images[:, 1]) / 255
    for policy, views in ((KEEP, expected), (FLIP, expected[:, :, ::-1])):
        made = make(batch, [policy], "mixup")
        assert made.shape == (5, 1, 16, 16, 3) and made.dtype == np.float32
        np.testing.assert_allclose(made[:, 0], views, atol=1e-6)
    normal = make(batch, [KEEP], "mixup", MEAN, STD)
    np.testing.assert_allclose(normal[:, 0], (expected - MEAN) / STD, atol=1e-5)


def test_cutmix_of_a_batch_has_each_share():
    batch = batch_of(9)
    batch["image"][:, 0], batch["image"][:, 1] = 0, 255
    made = make(batch, [KEEP], "cutmix")
    np.testing.assert_allclose(made.mean((1, 2, 3, 4)), 1 - batch["share"], atol=1e-5)


def test_image_and_partner_are_augmented_independently():
    """Half of the pairs are mirrored alike where each is mirrored with probability 1/2."""
    count = 400
    batch = {
        "share": np.full(count, 0.3, np.float32),
        "image": np.zeros((count, 2, 16, 16, 1), np.uint8),
    }
    batch["image"][:, :, :, 0] = 255  # the leftmost column
    policy = policies.make_policy("crop_flip", size=16, host_crop=True)
    made = make(batch, [policy], "mixup", (0.0,), (1.0,))[:, 0, 0, :, 0]
    kinds, times = np.unique(np.round(made[:, [0, 15]], 4), axis=0, return_counts=True)
    np.testing.assert_allclose(kinds, [[0, 1], [0.3, 0.7], [0.7, 0.3], [1, 0]], atol=1e-4)
    assert times.min() > 60  # 100 each, standard deviation 9


def test_an_example_depends_on_its_own_key_alone():
    batch = batch_of(8)
    policy = policies.make_policy("crop_flip", size=12)
    views = jax.jit(
        partial(policies.make_views, policies=[policy], mean=MEAN, std=STD, mix="cutmix")
    )
    whole = views(keys_of(8), batch)
    order = np.random.RandomState(0).permutation(8)
    shuffled = views(keys_of(8)[order], {name: x[order] for name, x in batch.items()})
    np.testing.assert_allclose(shuffled, np.asarray(whole)[order], atol=1e-5)


@pytest.mark.parametrize(
    ("count", "stored", "mix", "message"),
    [
        (2, 2, "mixup", "the number of policies must be 1 for mix='mixup'; got 2"),
        (1, 1, "cutmix", "the number of stored images must be 2 for mix='cutmix'; got 1"),
        (1, 2, "cut", "mix must be one of none, mixup, cutmix; got 'cut'"),
    ],
)
def test_what_cannot_be_mixed_is_refused(count, stored, mix, message):
    batch = {name: jnp.asarray(x) for name, x in batch_of(2).items()}
    batch["image"] = batch["image"][:, :stored]
    with pytest.raises(ValueError, match=message):
        policies.make_views(keys_of(2), batch, policies=[KEEP] * count, mean=MEAN, std=STD, mix=mix)
