"""The nearest class mean on real digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from supcon_jax.evaluation.class_means import nearest_class_mean

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = np.float32(PIXELS)
LABELS = LABELS.astype(np.int32)
REFERENCES, QUERIES = (PIXELS[:1437], LABELS[:1437]), PIXELS[1437:]


def test_equals_the_formula_written_out():
    actual = nearest_class_mean(QUERIES, *REFERENCES)
    means = []
    for c in range(10):
        rows = [row / np.linalg.norm(row) for row in np.float64(PIXELS[:1437][LABELS[:1437] == c])]
        means.append(sum(rows) / len(rows))
    cosines = [[q @ m / np.linalg.norm(m) for m in means] for q in np.float64(QUERIES)]
    np.testing.assert_array_equal(actual, np.argmax(cosines, axis=1))
    assert 0.8 < (actual == LABELS[1437:]).mean() < 1


def test_lengths_do_not_matter():
    lengths = np.random.RandomState(0).uniform(0.01, 100, (len(PIXELS), 1)).astype(np.float32)
    actual = nearest_class_mean(QUERIES * lengths[1437:], PIXELS[:1437] * lengths[:1437],
                                LABELS[:1437])  # fmt: skip
    np.testing.assert_array_equal(actual, nearest_class_mean(QUERIES, *REFERENCES))


def test_sizes_of_classes_do_not_matter():
    """Each reference of class 3 ten times: its mean is the same."""
    repeats = np.where(LABELS[:1437] == 3, 10, 1)
    many = np.repeat(PIXELS[:1437], repeats, axis=0), np.repeat(LABELS[:1437], repeats)
    np.testing.assert_array_equal(
        nearest_class_mean(QUERIES, *many), nearest_class_mean(QUERIES, *REFERENCES)
    )


def test_classes_may_be_missing():
    some = np.isin(LABELS[:1437], [3, 8])
    actual = nearest_class_mean(QUERIES, PIXELS[:1437][some], LABELS[:1437][some])
    assert set(actual) == {3, 8}


def test_references_of_length_zero_are_harmless():
    references = np.concatenate([PIXELS[:1437], np.zeros((5, 64), np.float32)])
    labels = np.concatenate([LABELS[:1437], np.arange(5, dtype=np.int32)])
    np.testing.assert_array_equal(
        nearest_class_mean(QUERIES, references, labels), nearest_class_mean(QUERIES, *REFERENCES)
    )


def test_equal_cosines_give_the_smallest_class():
    references, labels = np.eye(2, dtype=np.float32)[[0, 1, 0]], np.array([7, 9, 4])
    actual = nearest_class_mean(np.float32([[1, 0], [1, 1], [0, 0]]), references, labels)
    np.testing.assert_array_equal(actual, [4, 4, 4])


@pytest.mark.parametrize(
    ("references", "labels", "message"),
    [
        (PIXELS[:0], LABELS[:0], "got 0 rows and 0 labels"),
        (PIXELS[:3], LABELS[:2], "got 3 rows and 2 labels"),
        (PIXELS[:3, :63], LABELS[:3], "got 64 and 63 dimensions"),
    ],
)
def test_bad_input_is_told(unchecked, references, labels, message):
    with pytest.raises(ValueError, match=message):
        nearest_class_mean(QUERIES, references, labels)
