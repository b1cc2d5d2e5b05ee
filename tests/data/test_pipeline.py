"""Batches are pure functions of (seed, stage, k), and every image is counted as it should."""

import gc
import itertools
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from supcon_jax.data import pipeline
from supcon_jax.data.sources import Source

RUN = dict(seed=0, stage="supcon")

# Recorded with NumPy 2.4.6: a run that was stopped must go on with the same batches.
RECORDED = [918, 856, 106, 1415, 38, 865, 346, 541]
RECORDED_BALANCED = [31, 73, 41, 61, 53, 169, 25, 128, 40, 67, 50, 164]


def digits(size):
    """The first digits, and how often each was loaded."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    targets = labels.astype(np.int32)
    names = tuple("0123456789")
    return Source(
        "digits", size, names, (8, 8, 1), lambda i: (images[i], targets[i]), lambda: targets[:size]
    )


def numbered(size, labels=None):
    """Images that are their own number, in two bytes, of seven classes in turn."""
    labels = np.int32(np.arange(size) % 7 if labels is None else labels)

    def load(indices):
        high, low = np.divmod(indices, 256)
        return np.stack([high, low], -1).astype(np.uint8)[:, None, None], labels[indices]

    names = tuple("abcdefghij")[: labels.max(initial=6) + 1]
    return Source("numbered", size, names, (1, 1, 2), load, lambda: labels)


def numbers(batch, stored=0):
    high, low = np.moveaxis(batch["image"][:, stored, 0, 0].astype(int), -1, 0)
    return 256 * high + low


def epoch_of(size, batch_size, epoch, **run):
    per_epoch = size // batch_size
    ks = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    source = numbered(size)
    return np.concatenate(
        [numbers(pipeline.training_batch(source, k, batch_size=batch_size, **run)) for k in ks]
    )


def test_batch_has_the_images_and_labels_of_the_source():
    source = digits(100)
    batch = pipeline.training_batch(source, 3, batch_size=16, **RUN)
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "image": ((16, 1, 8, 8, 1), "uint8"),
        "label": ((16,), "int32"),
        "position": ((16,), "int32"),
    }
    np.testing.assert_array_equal(batch["position"], np.arange(16))
    images, labels = source.load(np.arange(100))
    for image, label in zip(batch["image"][:, 0], batch["label"], strict=True):
        same = (images == image).all(axis=(1, 2, 3))
        assert same.any() and (labels[same] == label).all()


def test_batch_depends_on_seed_stage_and_number_alone():
    source = digits(100)
    ks = [5, 0, 17, 3, 5, 40]
    forwards = {k: pipeline.training_batch(source, k, batch_size=16, **RUN) for k in sorted(ks)}
    for k in ks:
        again = pipeline.training_batch(digits(100), k, batch_size=16, **RUN)
        for name, array in again.items():
            np.testing.assert_array_equal(array, forwards[k][name])


@pytest.mark.parametrize(("size", "batch_size"), [(100, 16), (96, 16), (16, 16), (7, 3)])
def test_epoch_takes_whole_batches_without_repetition(size, batch_size):
    for epoch in range(3):
        taken = epoch_of(size, batch_size, epoch, **RUN)
        assert len(taken) == size - size % batch_size
        assert len(np.unique(taken)) == len(taken) and taken.max() < size


def test_what_an_epoch_leaves_out_changes():
    taken = [epoch_of(100, 16, epoch, **RUN) for epoch in range(40)]
    left_out = [set(range(100)) - set(epoch) for epoch in taken]
    assert {len(left) for left in left_out} == {4}
    assert len(set(map(frozenset, left_out))) == 40
    assert len(set.union(*left_out)) > 70  # 81 of 100 are expected, standard deviation 4


def test_seeds_stages_and_epochs_have_orders_of_their_own():
    orders = {
        (seed, stage, epoch): tuple(
            pipeline.epoch_order(50, seed=seed, stage=stage, epoch=epoch).tolist()
        )
        for seed in (0, 1, 2)
        for stage in ("supcon", "simclr", "linear", "cross_entropy")
        for epoch in range(5)
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    first = [order[0] for order in orders.values()]
    assert len(set(first)) > 25  # of 50; 35 are expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (dict(seed=0, stage="supcon", epoch=0), [651, 632, 128, 69, 1058, 1131, 116, 539]),
        (dict(seed=7, stage="linear", epoch=3), [142, 1089, 870, 55, 662, 577, 935, 856]),
    ],
)
def test_order_never_changes(run, expected):
    """Recorded with NumPy 2.4.6: a run that was stopped must go on with the same batches."""
    assert pipeline.epoch_order(1437, **run)[:8].tolist() == expected


def test_batches_never_change():
    """Recorded before batches could be balanced and mixed: nothing changes where they are not."""
    batch = pipeline.training_batch(numbered(1437), 12, batch_size=128, **RUN)
    assert numbers(batch)[:8].tolist() == RECORDED
    assert sorted(batch) == ["image", "label", "position"]


def test_orders_are_kept_and_cannot_be_written_to():
    order = pipeline.epoch_order(1000, epoch=3, **RUN)
    assert pipeline.epoch_order(1000, epoch=3, **RUN) is order
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
    pipeline.epoch_order.cache_clear()
    again = pipeline.epoch_order(1000, epoch=3, **RUN)
    assert again is not order
    np.testing.assert_array_equal(again, order)


# Batches with the same number of images of each class.


UNEQUAL = np.repeat(np.arange(6), [40, 3, 17, 8, 90, 12])  # images of each class


def balanced(labels, k, batch_size, samples_per_class, **run):
    source = numbered(len(labels), labels)
    options = dict(batch_size=batch_size, samples_per_class=samples_per_class)
    return pipeline.training_batch(source, k, **options, **{**RUN, **run})


@pytest.mark.parametrize(
    ("batch_size", "samples_per_class"), [(24, 4), (12, 4), (16, 4), (20, 4), (4, 4), (6, 1)]
)
def test_balanced_batch_has_so_many_images_of_so_many_classes(batch_size, samples_per_class):
    for k in range(40):
        batch = balanced(UNEQUAL, k, batch_size, samples_per_class)
        np.testing.assert_array_equal(UNEQUAL[numbers(batch)], batch["label"])
        counts = Counter(batch["label"].tolist())
        assert len(counts) == batch_size // samples_per_class
        assert set(counts.values()) == {samples_per_class}
        for c in counts:
            own = numbers(batch)[batch["label"] == c]
            assert len(set(own)) == min(samples_per_class, (c == UNEQUAL).sum())


def endless(size, stage):
    """One order of so many things after the other, as lists."""
    for epoch in itertools.count():
        yield pipeline.epoch_order(size, seed=0, stage=stage, epoch=epoch).tolist()


def walked(labels, batch_size, length):
    """Balanced batches with a memory: each class hands out group after group of its images."""

    def groups(c):
        own = np.flatnonzero(labels == c)
        for order in endless(len(own), f"supcon/class {c}"):
            if len(own) < length:
                yield own[(order * length)[:length]]
            else:
                for start in range(0, len(own) - length + 1, length):
                    yield own[order[start : start + length]]

    classes = len(set(labels.tolist()))
    count = batch_size // length
    hands = [groups(c) for c in range(classes)]
    for order in endless(classes, "supcon/classes"):
        given = {c: next(hand) for c, hand in enumerate(hands)}
        for start in range(0, classes - count + 1, count):
            yield np.stack([given[c] for c in order[start : start + count]], 1).reshape(-1)


@pytest.mark.parametrize(("batch_size", "length"), [(24, 4), (12, 4), (16, 4), (12, 6)])
def test_any_balanced_batch_is_the_one_that_walking_there_gives(batch_size, length):
    expected = list(itertools.islice(walked(UNEQUAL, batch_size, length), 100))
    for k in (77, 3, 99, 0, 40):
        batch = balanced(UNEQUAL, k, batch_size, length)
        np.testing.assert_array_equal(numbers(batch), expected[k])


def test_balanced_batches_depend_on_seed_stage_and_number_alone():
    orders = {
        run: tuple(numbers(balanced(UNEQUAL, run[2], 24, 4, seed=run[0], stage=run[1])).tolist())
        for run in itertools.product((0, 1), ("supcon", "linear"), range(10))
    }
    assert len(set(orders.values())) == len(orders)
    pipeline._small_order.cache_clear()
    for run in reversed(orders):
        again = balanced(UNEQUAL, run[2], 24, 4, seed=run[0], stage=run[1])
        assert tuple(numbers(again).tolist()) == orders[run]


def test_balanced_batches_never_change():
    assert numbers(balanced(UNEQUAL, 5, 24, 4))[:12].tolist() == RECORDED_BALANCED


def test_classes_and_their_images_come_equally_often():
    """Two of six classes a batch: three batches have each class once, 30 each image of a class."""
    labels = np.repeat(np.arange(6), 40)
    batches = [balanced(labels, k, 8, 4) for k in range(60)]
    for start in range(0, 60, 3):
        together = np.concatenate([b["label"] for b in batches[start : start + 3]])
        np.testing.assert_array_equal(np.bincount(together), np.full(6, 4))
    for start in (0, 30):
        together = np.concatenate([numbers(b) for b in batches[start : start + 30]])
        assert sorted(together) == list(range(240))


def test_classes_that_do_not_fill_a_batch_are_left_out_in_turn():
    batches = [balanced(UNEQUAL, k, 16, 4) for k in range(300)]  # four of six classes
    counts = np.bincount(np.concatenate([b["label"] for b in batches]), minlength=6) / 4
    assert abs(counts - 200).max() < 4 * np.sqrt(300 * (4 / 6) * (2 / 6))
    assert counts.min() < 200 < counts.max()


def test_each_device_gets_some_of_each_class():
    batch = balanced(UNEQUAL, 3, 24, 4)
    for part in np.split(batch["label"], 4):
        assert len(set(part.tolist())) == 6


def test_few_images_repeat_evenly_with_a_warning():
    for k in range(20):
        batch = balanced(UNEQUAL, k, 48, 8)
        own = Counter(numbers(batch)[batch["label"] == 1].tolist())
        assert sorted(own.values()) == [2, 3, 3]
    source = numbered(len(UNEQUAL), UNEQUAL)
    assert pipeline.check_balance(source, batch_size=48, samples_per_class=8) == (
        "numbered: 1 of 6 classes have fewer than samples_per_class=8 images, which repeat in a "
        "batch: b"
    )
    assert pipeline.check_balance(source, batch_size=12, samples_per_class=3) == ""
    many = numbered(7, np.arange(7))
    assert pipeline.check_balance(many, batch_size=14, samples_per_class=2).endswith(
        "a, b, c, d, e, ..."
    )


def test_classes_without_images_are_passed_over():
    labels = np.array([0, 0, 0, 4, 4, 4, 4])
    for k in range(6):
        assert sorted(balanced(labels, k, 4, 2)["label"]) == [0, 0, 4, 4]


@pytest.mark.parametrize(
    ("batch_size", "samples_per_class", "message"),
    [
        (24, 5, "batch_size=24 must be a multiple of samples_per_class=5, such as 20 or 25"),
        (3, 4, "batch_size=3 must be a multiple of samples_per_class=4, such as 4"),
        (
            24,
            2,
            "samples_per_class=2 makes 12 classes in a batch of 24, but there are 6; the smallest "
            "that fits is 4",
        ),
        (24, -4, "samples_per_class must be 0 (off) or more; got -4"),
    ],
)
def test_impossible_balance_is_refused(batch_size, samples_per_class, message):
    source = numbered(len(UNEQUAL), UNEQUAL)
    options = dict(batch_size=batch_size, samples_per_class=samples_per_class)
    for refuse in (
        lambda: pipeline.check_balance(source, **options),
        lambda: pipeline.training_batch(source, 0, **options, **RUN),
    ):
        with pytest.raises(ValueError, match="samples_per_class") as caught:
            refuse()
        assert str(caught.value) == message


def test_images_of_each_class_are_found_once_and_let_go():
    source, calls = numbered(50), []
    counted = replace(source, labels=lambda: calls.append(0) or source.labels())
    first = pipeline.images_by_class(counted)
    assert pipeline.images_by_class(counted) is first and len(calls) == 1
    for c, images in enumerate(first):
        np.testing.assert_array_equal(images, np.arange(c, 50, 7))
    gone = weakref.ref(counted)
    del counted
    gc.collect()
    assert gone() is None


# Images to mix with.


def mixed(k, alpha=1.0, size=64, **run):
    return pipeline.training_batch(
        numbered(300), k, batch_size=size, mix_alpha=alpha, **{**RUN, **run}
    )


def test_partners_are_a_permutation_of_the_batch():
    alone = pipeline.training_batch(numbered(300), 2, batch_size=64, **RUN)
    batch = mixed(2)
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "image": ((64, 2, 1, 1, 2), "uint8"),
        "label": ((64, 2), "int32"),
        "position": ((64,), "int32"),
        "share": ((64,), "float32"),
    }
    np.testing.assert_array_equal(batch["image"][:, :1], alone["image"])
    np.testing.assert_array_equal(batch["label"][:, 0], alone["label"])
    assert sorted(numbers(batch, 1)) == sorted(numbers(alone))
    assert (numbers(batch, 1) != numbers(batch, 0)).sum() > 55  # one stays with itself on average
    np.testing.assert_array_equal(batch["label"][:, 1], numbers(batch, 1) % 7)


def test_partners_depend_on_seed_stage_and_number_alone():
    def draw(run):
        batch = mixed(run[2], seed=run[0], stage=run[1])
        place = {number: i for i, number in enumerate(numbers(batch))}
        return tuple(place[n] for n in numbers(batch, 1)), tuple(batch["share"].tolist())

    drawn = {run: draw(run) for run in itertools.product((0, 1), ("cross_entropy", "x"), range(5))}
    for part in (0, 1):
        assert len({both[part] for both in drawn.values()}) == len(drawn)
    assert all(draw(run) == drawn[run] for run in reversed(drawn))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    shares = np.concatenate([mixed(k, alpha, size=250)["share"] for k in range(8)])
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_hardly_mixed_shares_are_finite():
    shares = mixed(0, alpha=1e-4)["share"]
    assert np.isfinite(shares).all() and ((shares == 0) | (shares == 1)).any()


@pytest.mark.parametrize("options", [{}, {"samples_per_class": 4}, {"mix_alpha": 1.0}])
def test_rows_of_a_batch_can_be_made_alone(options):
    places = np.array([3, 4, 17, 27], np.int32)
    made = [
        pipeline.training_batch(numbered(700), 5, batch_size=28, places=p, **options, **RUN)
        for p in (None, places)
    ]
    assert made[0].keys() == made[1].keys()
    for name, array in made[1].items():
        np.testing.assert_array_equal(array, made[0][name][places])


@pytest.mark.parametrize("size", [1, 4, 7, 8, 300])
def test_parts_of_evaluation_batches_are_their_rows(size):
    parts = [np.array([0, 1, 2, 6], np.int32), np.array([3, 4, 5, 7], np.int32)]
    whole = list(pipeline.evaluation_batches(numbered(size), 8))
    for places in parts:
        made = list(pipeline.evaluation_batches(numbered(size), 8, places))
        for (batch, count), (expected, of_whole) in zip(made, whole, strict=True):
            assert count == of_whole
            for name, array in batch.items():
                np.testing.assert_array_equal(array, expected[name][places])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 300])
def test_evaluation_has_every_image_once_in_order(size):
    seen, labels = [], []
    for batch, count in pipeline.evaluation_batches(numbered(size), 8):
        assert batch["image"].shape == (8, 1, 1, 1, 2) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
        assert 0 < count <= 8
        assert not batch["image"][count:].any() and not batch["label"][count:].any()
        seen += numbers(batch)[:count].tolist()
        labels += batch["label"][:count].tolist()
    assert seen == list(range(size))
    assert labels == [number % 7 for number in range(size)]


def test_evaluation_of_nothing_has_no_batches():
    assert list(pipeline.evaluation_batches(numbered(0), 8)) == []


# Prefetching. Other threads are counted to see that none is left behind.


@pytest.fixture
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 50])
def test_prefetch_keeps_items_and_order(size, depth):
    assert list(pipeline.prefetch(iter(range(size)), depth)) == list(range(size))


def test_prefetch_keeps_items_that_count_as_false():
    assert list(pipeline.prefetch(iter([0, "", False, (), {}]))) == [0, "", False, (), {}]


@pytest.mark.parametrize("depth", [1, 2])
def test_prefetch_makes_items_ahead_in_another_thread(depth):
    threads, ahead = [], threading.Event()

    def items():
        for number in range(3):
            threads.append(threading.get_ident())
            if number == 1:
                ahead.set()
            yield number

    ahead_of_us = pipeline.prefetch(items(), depth)
    assert next(ahead_of_us) == 0
    assert ahead.wait(10)  # item 1 is made before it is asked for
    assert list(ahead_of_us) == [1, 2]
    assert set(threads) - {threading.get_ident()} == set(threads)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_never_more_than_its_depth_ahead(depth):
    made = []
    taken = pipeline.prefetch((made.append(n) or n for n in range(20)), depth)
    for number in range(10):
        assert next(taken) == number
        assert len(made) <= number + 1 + depth
    taken.close()
    assert len(made) <= 10 + depth


@pytest.mark.parametrize("good", [0, 1, 5])
def test_prefetch_raises_what_was_raised_after_the_good_items(good):
    def items():
        yield from range(good)
        raise OSError("disk on fire")

    ahead = pipeline.prefetch(items())
    assert [next(ahead) for _ in range(good)] == list(range(good))
    with pytest.raises(OSError, match="disk on fire"):
        next(ahead)


def test_prefetch_can_be_closed_early():
    made = []

    def endless():
        while True:
            time.sleep(0.01)
            made.append(0)
            yield 0

    items = pipeline.prefetch(endless())
    next(items)
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 5
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count <= 3  # nobody goes on making items


def test_prefetch_can_be_closed_before_it_starts():
    pipeline.prefetch(iter([1])).close()


@pytest.mark.parametrize("mix_alpha", [0.0, 0.4])
@pytest.mark.parametrize("samples_per_class", [0, 4])
def test_stored_indices_are_the_images_of_the_batch(mix_alpha, samples_per_class):
    """What is streamed is what is taken from memory, partners included."""
    source = digits(100)
    options = dict(batch_size=16, samples_per_class=samples_per_class, mix_alpha=mix_alpha, **RUN)
    by_class = pipeline.images_by_class(source)
    for k in (0, 7):
        batch = pipeline.training_batch(source, k, **options)
        chosen = pipeline.stored_indices(k, size=100, by_class=by_class, **options)
        images, labels = source.load(chosen.reshape(-1))
        np.testing.assert_array_equal(images.reshape(batch["image"].shape), batch["image"])
        np.testing.assert_array_equal(labels.reshape(batch["label"].shape), batch["label"])
        assert chosen.shape == ((16, 2) if mix_alpha else (16,))


# What stands in for an image that cannot be decoded.


@pytest.mark.parametrize("samples_per_class", [0, 3])
@pytest.mark.parametrize("k", [0, 2, 11])
def test_stand_ins_are_all_others_and_no_two_places_share_the_first(samples_per_class, k):
    """Beyond the batch as long as there are others, with each of them once before the batch."""
    by_class = np.split(np.arange(60), [15, 30, 45])
    settings = dict(seed=1, stage="supcon", batch_size=12, by_class=by_class)
    settings["samples_per_class"] = samples_per_class
    batch = pipeline.batch_indices(60, k, **settings)
    firsts = []
    for place, image in enumerate(batch):
        found = pipeline.stand_ins(place, k, size=60, **settings)
        of_class = by_class[image // 15] if samples_per_class else np.arange(60)
        others = np.setdiff1d(of_class, batch)
        assert set(found) == set(of_class) and not set(found[: len(others)]) & set(batch)
        firsts += found[: len(others) // samples_per_class if samples_per_class else 4].tolist()
    assert len(set(firsts)) == len(firsts) == 48


def test_stand_ins_follow_the_batch_in_the_epochs_order_and_then_its_start():
    order = pipeline.epoch_order(30, seed=0, stage="linear", epoch=1)
    found = pipeline.stand_ins(2, 4, size=30, seed=0, stage="linear", batch_size=8)
    following = [*order[16:], *order[:8]]  # batch 4 is the second of the three of this epoch
    assert found[:3].tolist() == following[2::8]


def test_stand_ins_where_one_batch_is_all_there_is():
    """Then, and only then, an image of the batch comes twice."""
    found = pipeline.stand_ins(3, 5, size=8, seed=0, stage="linear", batch_size=8)
    assert sorted(found) == list(range(8))
    two = [pipeline.stand_ins(p, 5, size=10, seed=0, stage="s", batch_size=8)[0] for p in (4, 5)]
    batch = pipeline.batch_indices(10, 5, seed=0, stage="s", batch_size=8)
    assert len({*two, *batch}) == 10
