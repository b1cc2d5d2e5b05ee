"""The k-nearest-neighbour classifier against scikit-learn's, on real digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from supcon_jax.evaluation import knn
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


@pytest.mark.parametrize("block", [100, 718, 1436])
@pytest.mark.parametrize("neighbours", [1, 20, 200])
def test_blocks_of_references_do_not_matter(monkeypatch, block, neighbours):
    monkeypatch.setattr(knn, "BLOCK", block)
    actual = knn_predict(QUERIES[:40], *REFERENCES, neighbours=neighbours, chunk=16)
    np.testing.assert_array_equal(actual, by_scikit_learn(neighbours, 0.07)[:40])


@pytest.mark.parametrize("neighbours", [20, 200])
def test_many_classes_equal_loops_in_float64(neighbours):
    """Every digit has a hundred sorts."""
    sorts = LABELS * 100 + np.arange(1797, dtype=np.int32) % 100
    unit = PIXELS.astype(float) / np.linalg.norm(PIXELS.astype(float), axis=1, keepdims=True)
    expected = []
    for query in unit[1437:]:
        cosines, votes = unit[:1437] @ query, np.zeros(1000)
        for place in np.argsort(-cosines, kind="stable")[:neighbours]:
            votes[sorts[place]] += np.exp((cosines[place] - 1) / 0.07)
        expected.append(votes.argmax())
    actual = knn_predict(QUERIES, REFERENCES[0], sorts[:1437], neighbours=neighbours)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("block", [3, 4, 65536])
def test_of_references_equally_near_the_first_count(monkeypatch, block):
    monkeypatch.setattr(knn, "BLOCK", block)
    references = np.eye(4, dtype=np.float32)[[0, 1, 2, 1, 1, 0, 1, 2, 2]]
    labels = np.array([9, 5, 6, 5, 0, 1, 0, 0, 0])
    predict = partial(knn_predict, np.eye(4, dtype=np.float32)[:3], references, labels)
    np.testing.assert_array_equal(predict(neighbours=1), [9, 5, 6])
    np.testing.assert_array_equal(predict(neighbours=3), [1, 5, 0])  # 9 and 1 have equal weights
    np.testing.assert_array_equal(predict(neighbours=9), [1, 0, 0])


def test_memory_is_bounded_with_many_classes_and_neighbours():
    """Not chunk x neighbours x classes votes, and no more than a few times the similarities."""
    f32, i32 = (partial(jax.ShapeDtypeStruct, dtype=kind) for kind in (jnp.float32, jnp.int32))
    vote = knn._vote.lower(f32((64, 200)), i32((64, 200)), classes=1000, temperature=0.1)
    nearer = knn._nearer.lower(f32((64, 200)), i32((64, 200)), f32((64, 32)), f32((8192, 32)), 0)
    sizes = [part.compile().memory_analysis().temp_size_in_bytes for part in (vote, nearer)]
    assert sizes[0] < 4 * (4 * 64 * 1000) and sizes[1] < 4 * (4 * 64 * 8192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=LABELS[:5]), "got 1437 rows and 5 labels"),
        (dict(references=PIXELS[:0], labels=LABELS[:0]), "got 0 rows and 0 labels"),
        (dict(features=PIXELS[:3, :60]), "got 60 and 64 dimensions"),
        (dict(neighbours=0), "neighbours must be at least 1 and temperature above 0; got 0 and"),
        (dict(temperature=0.0), "temperature above 0; got 20 and 0.0"),
    ],
)
def test_bad_input_is_told(unchecked, arguments, message):
    usual = dict(features=QUERIES, references=REFERENCES[0], labels=REFERENCES[1])
    with pytest.raises(ValueError, match=message):
        knn_predict(**usual | arguments)
