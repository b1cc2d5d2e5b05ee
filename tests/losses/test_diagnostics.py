"""The values that make a loss readable, against the loss itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import (
    contrastive_accuracy,
    floor,
    num_positives,
    supcon_in_loss,
    supcon_loss,
    uniform_value,
)

DENOMINATOR_MODES = ("all", "one_positive", "only_negatives")
LABELS = np.array([0, 1, 0, 2, 0, 1, 3, 0], np.int32)  # classes of 4, 2, 1 and 1 samples
ONE_CLASS = np.zeros(8, np.int32)
LOSSES = {
    loss.__name__: jax.jit(loss, static_argnames="denominator_mode")
    for loss in (supcon_loss, supcon_in_loss)
}
accuracy_of = jax.jit(contrastive_accuracy, static_argnames="contrast_mode")


def random_features(seed, *shape):
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def positives_of(features, labels):
    return num_positives(jnp.asarray(features), None if labels is None else jnp.asarray(labels))


@pytest.mark.parametrize("denominator_mode", DENOMINATOR_MODES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_uniform_value_is_the_loss_of_collapsed_features(loss, views, denominator_mode):
    features = np.broadcast_to(np.float32([0.6, 0.0, -0.8]), (8, views, 3))
    for labels in (LABELS, ONE_CLASS):
        positives = positives_of(features, labels)
        expected = uniform_value(positives, 8 * views - 1, denominator_mode)
        for temperature in (0.07, 1.0):
            losses = LOSSES[loss](
                features, labels, temperature=temperature, denominator_mode=denominator_mode
            )
            np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


def test_uniform_value_is_the_published_logarithm():
    positives = jnp.array([1, 5, 15, 0])
    cases = {
        "all": [15, 15, 15, 1],
        "one_positive": [15, 11, 1, 1],
        "only_negatives": [14, 10, 1, 1],
    }
    for mode, sizes in cases.items():
        np.testing.assert_allclose(uniform_value(positives, 15, mode), np.log(sizes), rtol=1e-6)


@pytest.mark.parametrize("denominator_mode", ["all", "one_positive"])
@pytest.mark.parametrize("loss", LOSSES)
def test_floor_is_approached_by_orthogonal_classes(loss, denominator_mode):
    features = np.eye(4, dtype=np.float32)[LABELS, None].repeat(2, axis=1)
    expected = floor(positives_of(features, LABELS), denominator_mode)
    gaps = [
        np.abs(
            LOSSES[loss](
                features, LABELS, temperature=temperature, denominator_mode=denominator_mode
            )
            - expected
        ).max()
        for temperature in (1.0, 0.2, 0.03)
    ]
    assert gaps[0] > 0.5 and gaps[1] < 0.2 and gaps[2] < 1e-5


@pytest.mark.parametrize("denominator_mode", ["all", "one_positive"])
@pytest.mark.parametrize("loss", LOSSES)
def test_floor_is_never_undercut(loss, denominator_mode, x64):
    classes = np.eye(4)[LABELS, None]
    for seed in range(20):
        noise = random_features(seed, 8, 2, 4)
        features = classes * (seed % 4) + noise * 10.0 ** (seed % 3)  # from collapsed to random
        for labels in (LABELS, ONE_CLASS):
            losses = LOSSES[loss](
                features, labels, temperature=0.1, denominator_mode=denominator_mode
            )
            lowest = floor(positives_of(features, labels), denominator_mode)
            assert (losses >= lowest - 1e-6).all()


def test_floor_is_the_logarithm_of_the_positives():
    positives = jnp.array([1, 5, 15, 0])
    np.testing.assert_allclose(floor(positives), np.log([1, 5, 15, 1]), rtol=1e-6)
    np.testing.assert_array_equal(floor(positives, "one_positive"), np.zeros(4))


@pytest.mark.parametrize("loss", LOSSES)
def test_only_negatives_has_no_floor(loss):
    features = np.eye(4, dtype=np.float32)[LABELS, None].repeat(2, axis=1)
    for temperature in (0.1, 0.01, 0.001):
        losses = LOSSES[loss](
            features, LABELS, temperature=temperature, denominator_mode="only_negatives"
        )
        assert (losses < 3 - 1 / temperature).all()
    expected = [-np.inf, -np.inf, 0]
    np.testing.assert_array_equal(floor(jnp.array([1, 5, 0]), "only_negatives"), expected)


def accuracy_by_loops(features, labels, contrast_mode):
    batch, views, dim = features.shape
    z = features.reshape(-1, dim).astype(np.float64)
    y = np.repeat(np.arange(batch) if labels is None else labels, views)
    accuracy = np.zeros(batch)
    for b in range(batch):
        anchors = range(b * views, b * views + (views if contrast_mode == "all" else 1))
        for i in anchors:
            others = [a for a in range(len(z)) if a != i]
            nearest = max(others, key=lambda a, i=i: z[i] @ z[a])
            accuracy[b] += (y[nearest] == y[i]) / len(anchors)
    return accuracy


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("labels", [None, LABELS, ONE_CLASS])
@pytest.mark.parametrize("views", [1, 3])
def test_contrastive_accuracy_equals_the_loop(views, labels, contrast_mode):
    for seed in range(5):
        features = random_features(seed, 8, views, 3)
        expected = accuracy_by_loops(features, labels, contrast_mode)
        actual = accuracy_of(features, labels, contrast_mode=contrast_mode)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_contrastive_accuracy_ignores_the_anchor_and_counts_a_tie_as_a_miss():
    features = np.array([[0, 1], [1, 0], [0, -1], [1, 0]], np.float32)
    np.testing.assert_array_equal(accuracy_of(features, np.array([0, 0, 1, 1])), [0, 0, 0, 0])
    np.testing.assert_array_equal(accuracy_of(features, np.array([0, 1, 0, 1])), [0, 1, 0, 1])


def test_contrastive_accuracy_of_two_axes_is_of_one_view():
    features = random_features(1, 8, 3)
    expected = accuracy_by_loops(features[:, None], LABELS, "all")
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(accuracy_of(features, LABELS), expected)


@pytest.mark.parametrize("labels", [None, LABELS])
def test_contrastive_accuracy_sharded(mesh_of, labels):
    features = random_features(0, 8, 2, 3)
    mapped = jax.shard_map(
        functools.partial(contrastive_accuracy, axis_name="data"),
        mesh=mesh_of(4),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    expected = accuracy_by_loops(features, labels, "all")
    np.testing.assert_array_equal(jax.jit(mapped)(features, labels), expected)


def test_unknown_modes_are_refused(unchecked):
    positives = jnp.array([1, 3])
    for function in (floor, functools.partial(uniform_value, others=3)):
        with pytest.raises(ValueError, match="'only_negatives', got 'none'"):
            function(positives, denominator_mode="none")
    with pytest.raises(ValueError, match=r"contrast_mode.*'all', 'one', got 'two'"):
        contrastive_accuracy(jnp.ones((2, 3)), contrast_mode="two")
