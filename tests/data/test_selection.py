"""Parts of real training sets: stratified, nested, long-tailed, with wrong labels; all fixed."""

import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.datasets import load_digits

from supcon_jax.data import selection
from supcon_jax.data.sources import Source, open_source

OPTIONS = dict(name="", load_size=8, channels=1)
UNEQUAL = np.repeat(np.arange(5), [30, 1, 12, 50, 7])  # images of each class


# Recorded with NumPy 2.4.6: results are compared over runs that must have the same images.
RECORDED_FRACTION = [2, 16, 26, 30, 33, 54, 55, 73, 75, 86, 93]
RECORDED_NOISE = [2, 3, 1, 3, 3, 2, 3, 1, 3, 3, 0, 3, 2, 4, 0, 1, 4, 0, 4, 0]


def digits():
    return open_source("digits", "train", directory="", memory_limit_gb=1.0, **OPTIONS)


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    """The first 120 digits as PNG files: a source whose images can be read without decoding."""
    root = tmp_path_factory.mktemp("digits")
    pixels, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(pixels[:120], labels, strict=False)):
        file = root / "train" / str(label) / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(image.reshape(8, 8) * 15)).save(file)
    return open_source("folder", "train", directory=str(root), memory_limit_gb=0.0, **OPTIONS)


def numbered(labels):
    """Images that are their own number, in two bytes."""
    labels = np.int32(labels)

    def load(indices):
        return np.stack(np.divmod(indices, 256), -1).astype(np.uint8)[:, None, None], labels[
            indices
        ]

    names = tuple(f"class {c}" for c in range(labels.max() + 1))
    return Source("numbered", len(labels), names, (1, 1, 2), load, lambda: labels)


def numbers(source):
    """The images that are left, by their number."""
    images, _ = source.load(np.arange(source.size))
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]


def counts(source):
    return np.bincount(source.labels(), minlength=len(source.class_names))


def assert_consistent(source):
    """`load`, `labels` and `read` agree, in any order."""
    indices = np.random.RandomState(0).permutation(source.size)[:50]
    _, labels = source.load(indices)
    assert labels.dtype == source.labels().dtype == np.int32
    assert source.labels().shape == (source.size,)
    np.testing.assert_array_equal(labels, source.labels()[indices])
    if source.read is not None:
        assert [row.label for row in source.read(indices)] == labels.tolist()


SELECTIONS = [
    dict(fraction=0.3),
    dict(per_class=4),
    dict(imbalance=3.0),
    dict(label_noise=0.4),
    dict(fraction=0.8, per_class=3, imbalance=2.0, label_noise=0.5),
]


@pytest.mark.parametrize("options", SELECTIONS)
def test_images_and_labels_stay_together(options, digit_folder):
    for source in (digits(), digit_folder):
        part = selection.select(source, **options)
        assert_consistent(part)
        assert part.class_names == source.class_names and part.name.startswith(source.name)
        assert (part.read is None) == (source.read is None)
        again = selection.select(source, **options)
        np.testing.assert_array_equal(again.labels(), part.labels())
        images, _ = part.load(np.arange(part.size))
        np.testing.assert_array_equal(again.load(np.arange(part.size))[0], images)


def test_nothing_selected_is_the_source_itself():
    source = digits()
    assert selection.select(source) is source


def test_encoded_images_are_those_that_are_loaded(digit_folder):
    part = selection.select(digit_folder, per_class=3, label_noise=0.5)
    images, _ = part.load(np.arange(part.size))
    for row, image in zip(part.read(np.arange(part.size)), images, strict=True):
        with Image.open(row.image) as file:
            np.testing.assert_array_equal(np.asarray(file), image[..., 0])


def test_order_of_the_steps():
    source = numbered(np.repeat(np.arange(4), 200))
    part = selection.select(source, fraction=0.5, per_class=5, imbalance=10.0, label_noise=0.9)
    step = selection.long_tail(source, 10.0)
    step = selection.images_per_class(selection.fraction_of(step, 0.5), 5)
    np.testing.assert_array_equal(numbers(part), numbers(step))
    np.testing.assert_array_equal(part.labels(), selection.with_label_noise(step, 0.9).labels())
    assert part.name == "numbered (long tail 10) (50 %) (5 a class) (90 % label noise)"


def test_selections_never_change():
    source = numbered(UNEQUAL)
    assert numbers(selection.select(source, fraction=0.1)).tolist() == RECORDED_FRACTION
    noisy = selection.select(source, label_noise=0.5).labels()
    assert noisy[-20:].tolist() == RECORDED_NOISE


# Fewer images.


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.25, 0.5, 1.0])
def test_fraction_is_of_each_class(fraction):
    source = numbered(UNEQUAL)
    part = selection.fraction_of(source, fraction)
    expected = [max(1, round(fraction * n)) for n in np.bincount(UNEQUAL).tolist()]
    np.testing.assert_array_equal(counts(part), expected)
    chosen = numbers(part)
    assert (np.diff(chosen) > 0).all()  # in the order of the source, each once
    np.testing.assert_array_equal(part.labels(), UNEQUAL[chosen])


def test_smaller_selections_are_inside_larger_ones():
    source = numbered(np.repeat(np.arange(5), 100)[np.random.RandomState(3).permutation(500)])
    for choose, sizes in (
        (selection.fraction_of, (0.01, 0.03, 0.1, 0.5, 1.0)),
        (selection.images_per_class, (1, 2, 10, 50, 100)),
        (selection.long_tail, (100.0, 50.0, 10.0, 1.0)),
    ):
        sets = [set(numbers(choose(source, size))) for size in sizes]
        assert all(a < b for a, b in itertools.pairwise(sets))
        assert len(sets[-1]) == 500


def test_another_seed_chooses_other_images():
    source = numbered(np.repeat(np.arange(5), 100))
    first, second = (numbers(selection.fraction_of(source, 0.1, seed)) for seed in (0, 1))
    assert len(first) == len(second) == 50 and len(set(first) & set(second)) < 20


def test_choice_within_a_class_is_even():
    source = numbered(np.repeat(np.arange(2), [200, 40]))
    seen = Counter(
        n for seed in range(200) for n in numbers(selection.images_per_class(source, 20, seed))
    )
    times = np.array([seen[n] for n in range(240)])
    assert abs(times[:200] - 20).max() < 4.5 * np.sqrt(200 * 0.1 * 0.9)
    assert abs(times[200:] - 100).max() < 4.5 * np.sqrt(200 * 0.25)


def test_images_of_each_class():
    part = selection.images_per_class(digits(), 5)
    np.testing.assert_array_equal(counts(part), np.full(10, 5))
    assert (part.size, part.name) == (50, "digits/train (5 a class)")


def test_labels_are_asked_for_once():
    """Where images are streamed, the labels may cost a pass over all records."""
    calls = []
    source = numbered(UNEQUAL)
    labels = source.labels
    object.__setattr__(source, "labels", lambda: calls.append(0) or labels())
    part = selection.select(source, fraction=0.5, imbalance=2.0)
    part.labels()
    assert len(calls) == 1


# Long tails.


@pytest.mark.parametrize(
    ("classes", "each", "imbalance", "total"),
    [
        (10, 5000, 10, 20_431),
        (10, 5000, 50, 13_996),
        (10, 5000, 100, 12_406),
        (100, 500, 10, 19_573),
        (100, 500, 50, 12_608),
        (100, 500, 100, 10_847),
    ],
)
def test_long_tail_has_the_sizes_of_the_published_sets(classes, each, imbalance, total):
    """Long-tailed CIFAR-10 and CIFAR-100 of https://github.com/kaidic/LDAM-DRW."""
    part = selection.long_tail(numbered(np.repeat(np.arange(classes), each)), imbalance)
    expected = [int(each * (1 / imbalance) ** (c / (classes - 1))) for c in range(classes)]
    np.testing.assert_array_equal(counts(part), expected)
    assert part.size == total


@pytest.mark.parametrize(
    ("sizes", "imbalance", "expected"),
    [
        ([30, 1, 12, 50, 7], 16.0, [30, 1, 7, 3, 1]),  # 30, 15, 7.5, 3.75, 1.875
        ([40, 100, 100], 4.0, [40, 20, 10]),
        ([8, 9, 3, 9], 1.0, [8, 8, 3, 8]),
        ([9, 9, 9], 1e6, [9, 1, 1]),
        ([5], 10.0, [5]),
    ],
)
def test_long_tail_of_unequal_classes_starts_from_the_first(sizes, imbalance, expected):
    source = numbered(np.repeat(np.arange(len(sizes)), sizes))
    np.testing.assert_array_equal(counts(selection.long_tail(source, imbalance)), expected)


def test_class_without_images_does_not_matter():
    source = numbered(np.repeat([1, 3, 4], [20, 20, 20]))
    np.testing.assert_array_equal(counts(selection.long_tail(source, 16.0)), [0, 10, 0, 2, 1])
    np.testing.assert_array_equal(counts(selection.fraction_of(source, 0.01)), [0, 1, 0, 1, 1])


# Label noise.


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.8, 1.0])
def test_share_of_wrong_labels(probability):
    true = np.random.RandomState(1).randint(10, size=20_000)
    noisy = selection.with_label_noise(numbered(true), probability).labels()
    wrong = probability * 9 / 10
    assert abs((noisy != true).mean() - wrong) < 4 * np.sqrt(wrong * (1 - wrong) / 20_000) + 1e-12
    if probability:
        shifts = np.bincount((noisy - true)[noisy != true] % 10, minlength=10)[1:]
        assert scipy.stats.chisquare(shifts).pvalue > 0.01


def test_images_keep_their_places_under_noise():
    source = numbered(UNEQUAL)
    noisy = selection.with_label_noise(source, 0.5)
    np.testing.assert_array_equal(numbers(noisy), np.arange(len(UNEQUAL)))
    np.testing.assert_array_equal(source.labels(), UNEQUAL)  # the source is as it was
    assert_consistent(noisy)


def test_more_noise_keeps_the_labels_of_less():
    true = np.random.RandomState(1).randint(10, size=2000)
    less, more = (selection.with_label_noise(numbered(true), p).labels() for p in (0.2, 0.6))
    replaced = less != true
    np.testing.assert_array_equal(more[replaced], less[replaced])
    assert (more != true).sum() > replaced.sum() > 0


def test_another_seed_draws_other_labels():
    true = np.random.RandomState(1).randint(10, size=2000)
    first, second = (selection.with_label_noise(numbered(true), 0.5, seed) for seed in (0, 1))
    wrong = [part.labels() != true for part in (first, second)]
    assert abs((wrong[0] & wrong[1]).mean() - 0.45**2) < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fraction=0.0), "fraction must be above 0 and at most 1; got 0.0"),
        (dict(fraction=1.5), "fraction must be above 0 and at most 1; got 1.5"),
        (dict(fraction=float("nan")), "fraction must be above 0 and at most 1; got nan"),
        (dict(per_class=-2), "per_class must be at least 1; got -2"),
        (
            dict(per_class=10),
            "per_class=10 is more than the 1 images of class 'class 1' in numbered, the fewest of "
            "all classes",
        ),
        (
            dict(imbalance=0.01),
            "imbalance must be at least 1, images of the first class over those of the last; got "
            "0.01",
        ),
        (
            dict(imbalance=float("inf")),
            "imbalance must be at least 1, images of the first class over those of the last; got "
            "inf",
        ),
        (dict(label_noise=-0.1), "label_noise must be a probability from 0 to 1; got -0.1"),
        (dict(label_noise=1.1), "label_noise must be a probability from 0 to 1; got 1.1"),
    ],
)
def test_impossible_selections_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        selection.select(numbered(UNEQUAL), **options)
    assert str(caught.value) == message
