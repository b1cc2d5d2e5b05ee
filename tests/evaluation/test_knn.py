"""The k-nearest-neighbour classifier against scikit-learn's, on real digits."""

from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from supcon_jax.evaluation.knn import knn_predict

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = (PIXELS - PIXELS[:1437].mean(axis=0)).astype(np.float32)
LABELS = LABELS.astype(np.int32)
REFERENCES, QUERIES = (PIXELS[:1437], LABELS[:1437]), PIXELS[1437:]


def by_scikit_learn(neighbours, temperature, references=REFERENCES, queries=QUERIES):
    """Weights exp((cosine - largest cosine) / temperature): a common factor changes nothing."""

    def weights(distances):
        return np.exp((distances.min(axis=1, keepdims=True) - distances) / temperature)

    model = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute", weights=weights)
    return model.fit(references[0].astype(float), references[1]).predict(queries.astype(float))


@pytest.mark.parametrize("neighbours", [1, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_scikit_learn(neighbours, temperature):
    actual = knn_predict(QUERIES, *REFERENCES, neighbours=neighbours, temperature=temperature)
    expected = by_scikit_learn(neighbours, temperature)
    np.testing.assert_array_equal(actual, expected)
    assert actual.shape == (360,) and np.issubdtype(actual.dtype, np.integer)
    assert (actual == LABELS[1437:]).mean() > 0.8


def test_defaults_are_those_of_the_paper():
    np.testing.assert_array_equal(knn_predict(QUERIES, *REFERENCES), by_scikit_learn(20, 0.07))


def test_temperature_matters():
    votes = [knn_predict(QUERIES, *REFERENCES, neighbours=400, temperature=t) for t in (0.05, 10.0)]
    assert (votes[0] != votes[1]).sum() > 10
    majority = by_scikit_learn(400, 1e4)
    assert (votes[1] == majority).mean() > 0.99


@pytest.mark.parametrize("temperature", [0.003, 0.0005])
def test_small_temperatures_follow_the_nearest(temperature):
    actual = knn_predict(QUERIES, *REFERENCES, temperature=temperature)
    np.testing.assert_array_equal(actual, by_scikit_learn(20, temperature))


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_chunks_do_not_matter(chunk):
    predict = partial(knn_predict, QUERIES[:20], *REFERENCES)
    np.testing.assert_array_equal(predict(chunk=chunk), predict(chunk=512))


@pytest.mark.parametrize("count", [1, 512, 513])
def test_every_query_is_answered_once(count):
    queries = np.resize(QUERIES, (count, 64))
    actual = knn_predict(queries, *REFERENCES)
    np.testing.assert_array_equal(actual, np.resize(by_scikit_learn(20, 0.07), count))


def test_lengths_do_not_matter():
    lengths = np.random.RandomState(0).uniform(0.01, 100, (len(PIXELS), 1)).astype(np.float32)
    references = (REFERENCES[0] * lengths[:1437], REFERENCES[1])
    actual = knn_predict(QUERIES * lengths[1437:], *references)
    np.testing.assert_array_equal(actual, knn_predict(QUERIES, *REFERENCES))


def test_more_neighbours_than_references_takes_all():
    few = (REFERENCES[0][:30], REFERENCES[1][:30])
    actual = knn_predict(QUERIES, *few, neighbours=1000, temperature=0.2)
    np.testing.assert_array_equal(actual, by_scikit_learn(30, 0.2, few))


def test_classes_may_be_missing():
    some = np.isin(LABELS[:1437], [3, 8])
    references = (REFERENCES[0][some], REFERENCES[1][some])
    actual = knn_predict(QUERIES, *references)
    np.testing.assert_array_equal(actual, by_scikit_learn(20, 0.07, references))
    assert set(actual) == {3, 8}
