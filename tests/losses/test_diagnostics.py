"""The values that make a loss readable, against the loss itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import (
    alignment,
    contrastive_accuracy,
    excess,
    floor,
    num_positives,
    supcon_in_loss,
    supcon_loss,
    uniform_value,
    uniformity,
)

DENOMINATOR_MODES = ("all", "one_positive", "only_negatives")
LABELS = np.array([0, 1, 0, 2, 0, 1, 3, 0], np.int32)  # classes of 4, 2, 1 and 1 samples
ONE_CLASS = np.zeros(8, np.int32)
LOSSES = {
    loss.__name__: jax.jit(loss, static_argnames="denominator_mode")
    for loss in (supcon_loss, supcon_in_loss)
}
accuracy_of = jax.jit(contrastive_accuracy, static_argnames=("contrast_mode", "block_size"))


def random_features(seed, *shape):
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def positives_of(features, labels):
    return num_positives(jnp.asarray(features), None if labels is None else jnp.asarray(labels))


# num_positives.


@pytest.mark.parametrize("views", [1, 2, 3])
def test_num_positives_counts(views):
    features, labels = jnp.ones((6, views, 2)), jnp.array([0, 1, 0, 2, 0, 1])
    in_class = np.array([3, 2, 3, 1, 3, 2])
    counts = num_positives(features, labels)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, views * in_class - 1)
    np.testing.assert_array_equal(num_positives(features), np.full(6, views - 1))


def test_num_positives_of_two_axes():
    counts = num_positives(jnp.ones((3, 2)), jnp.array([0, 0, 1]))
    np.testing.assert_array_equal(counts, [1, 1, 0])


def test_num_positives_with_a_cap_a_mask_and_a_queue():
    features, labels = jnp.ones((6, 2, 2)), jnp.array([0, 1, 0, 2, 0, 1])
    counts = num_positives(features, labels, positives_cap=2)
    np.testing.assert_array_equal(counts, [3, 3, 3, 1, 3, 3])
    queue = jnp.ones((4, 2)), jnp.array([0, 0, 2, 5]), jnp.array([True, False, True, True])
    counts = num_positives(features, labels, queue=queue)
    np.testing.assert_array_equal(counts, [6, 3, 6, 2, 6, 3])
    np.testing.assert_array_equal(num_positives(features, queue=queue), np.ones(6))
    mask = np.zeros((6, 6), np.float32)
    mask[0, [0, 3]] = 0.5, 0.1  # its own other view, and both of sample 3
    mask[1, 4] = 2
    counts = num_positives(features, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(counts, [3, 2, 0, 0, 0, 0])


def test_num_positives_are_those_that_the_loss_has(x64):
    """The loss of collapsed features is ln(P + N); with distinct labels all but P are N."""
    features = jnp.ones((6, 2, 3))
    labels = jnp.array([0, 1, 0, 2, 0, 1])
    for cap in (0, 2, 4):
        positives = num_positives(features, labels, positives_cap=cap)
        others = 11 - num_positives(features, labels) + positives
        losses = supcon_loss(features, labels, positives_cap=cap)
        np.testing.assert_allclose(losses, uniform_value(positives, others), rtol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_num_positives_sharded(mesh_of, labelled):
    in_class = (LABELS[:, None] == LABELS).sum(1) if labelled else np.ones(8)
    mapped = jax.shard_map(
        functools.partial(num_positives, axis_name="data"),
        mesh=mesh_of(4),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    counts = jax.jit(mapped)(jnp.ones((8, 2, 3)), LABELS if labelled else None)
    np.testing.assert_array_equal(counts, 2 * in_class - 1)


def test_num_positives_refuses_wrong_arguments(unchecked):
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        num_positives(np.ones(4, np.float32))
    features = np.ones((4, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(4,\)"):
        num_positives(features, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"positives_cap must be .* the 2 views, got 3"):
        num_positives(features, np.zeros(4, int), positives_cap=3)
    with pytest.raises(ValueError, match=r"mask must be .* \(4, 4\), got \(4, 5\)"):
        num_positives(features, mask=np.ones((4, 5)))


# Where the loss starts and ends.


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


def test_excess_is_what_is_left_over_the_floor():
    features = random_features(0, 8, 2, 3)
    losses = LOSSES["supcon_loss"](features, LABELS)
    positives = positives_of(features, LABELS)
    np.testing.assert_allclose(excess(losses, positives), losses - np.log(positives), rtol=1e-6)
    np.testing.assert_array_equal(excess(losses, positives, "one_positive"), losses)
    with pytest.raises(ValueError, match="'only_negatives' has no floor"):
        excess(losses, positives, "only_negatives")


# How the features lie.


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
        for block_size in (None, 5):
            actual = accuracy_of(
                features, labels, contrast_mode=contrast_mode, block_size=block_size
            )
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


def alignment_by_loops(features, labels):
    batch, views, dim = features.shape
    z = features.reshape(-1, dim)
    y = np.repeat(np.arange(batch) if labels is None else labels, views)
    values = np.zeros(len(z))
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if y[p] == y[i] and p != i]
        values[i] = np.mean([np.sum((z[i] - z[p]) ** 2) for p in positives]) if positives else 0
    return values.reshape(batch, views).mean(1)


def uniformity_by_loops(features, t):
    z = features.reshape(-1, features.shape[-1])
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    return np.log(np.mean([np.exp(-t * np.sum((z[i] - z[j]) ** 2)) for i, j in pairs]))


@pytest.mark.parametrize("labels", [None, LABELS, ONE_CLASS])
@pytest.mark.parametrize("views", [1, 3])
def test_alignment_equals_the_loop(views, labels, x64):
    features = 2 * random_features(3, 8, views, 3).astype(float)
    actual = jax.jit(alignment)(features, labels)
    np.testing.assert_allclose(actual, alignment_by_loops(features, labels), atol=1e-12)


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_equals_the_loop(t, block_size, x64):
    features = random_features(4, 8, 2, 3).astype(float)
    actual = uniformity(jnp.asarray(features), t=t, block_size=block_size)
    np.testing.assert_allclose(actual, uniformity_by_loops(features, t), rtol=1e-12)


def test_a_collapsed_encoder_is_aligned_and_not_uniform():
    features = jnp.broadcast_to(jnp.array([0.6, 0.0, -0.8]), (8, 2, 3))
    np.testing.assert_allclose(alignment(features, jnp.asarray(LABELS)), 0, atol=1e-6)
    np.testing.assert_allclose(uniformity(features), 0, atol=1e-6)


def test_a_single_row_is_uniform_and_aligned():
    np.testing.assert_array_equal(uniformity(jnp.ones((1, 3))), 0)
    np.testing.assert_array_equal(alignment(jnp.ones((1, 3)), jnp.zeros(1, int)), 0)


@pytest.mark.parametrize("block_size", [None, 3])
def test_alignment_and_uniformity_sharded(mesh_of, block_size):
    features = random_features(0, 8, 2, 3)

    def both(features, labels):
        even = uniformity(features, axis_name="data", block_size=block_size)
        return alignment(features, labels, axis_name="data"), even

    mapped = jax.shard_map(
        both, mesh=mesh_of(4), in_specs=(P("data"), P("data")), out_specs=(P("data"), P())
    )
    aligned, even = jax.jit(mapped)(features, LABELS)
    np.testing.assert_allclose(aligned, alignment_by_loops(features, LABELS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(even, uniformity_by_loops(features, 2.0), rtol=1e-5)


def test_unknown_modes_are_refused(unchecked):
    positives = jnp.array([1, 3])
    for function in (floor, functools.partial(uniform_value, others=3)):
        with pytest.raises(ValueError, match="'only_negatives', got 'none'"):
            function(positives, denominator_mode="none")
    with pytest.raises(ValueError, match=r"contrast_mode.*'all', 'one', got 'two'"):
        contrastive_accuracy(jnp.ones((2, 3)), contrast_mode="two")
