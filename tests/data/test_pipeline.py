"""Batches are pure functions of (seed, stage, k), and every image is counted as it should."""

import threading
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from supcon_jax.data import pipeline
from supcon_jax.data.sources import Source

RUN = dict(seed=0, stage="supcon")


def digits(size):
    """The first digits, and how often each was loaded."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    targets = labels.astype(np.int32)
    names = tuple("0123456789")
    return Source(
        "digits", size, names, (8, 8, 1), lambda i: (images[i], targets[i]), lambda: targets[:size]
    )


def numbered(size):
    """Images that are their own number, in two bytes."""

    def load(indices):
        high, low = np.divmod(indices, 256)
        return np.stack([high, low], -1).astype(np.uint8)[:, None, None], np.int32(indices % 7)

    labels = np.int32(np.arange(size) % 7)
    return Source("numbered", size, tuple("abcdefg"), (1, 1, 2), load, lambda: labels)


def numbers(batch):
    high, low = np.moveaxis(batch["image"][:, 0, 0, 0].astype(int), -1, 0)
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
