"""The losses that the paper compares with, each against its formula written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import large_margin_softmax, n_pairs_loss, nt_xent_loss, triplet_loss

LABELS = np.array([0, 1, 0, 2, 0, 1, 3, 0])
triplets = jax.jit(triplet_loss, static_argnames="axis_name")
large_margin = jax.jit(large_margin_softmax, static_argnames="margin")


def unit(seed, *shape):
    features = np.random.default_rng(seed).normal(size=shape)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def along(function, x, direction, step=1e-6):
    """Derivative of the sum of `function` at x, by finite differences and by autodiff."""
    above, below = (np.sum(function(x + h * direction)) for h in (step, -step))
    gradient = jax.grad(lambda x: function(x).sum())(x)
    return (above - below) / (2 * step), np.sum(gradient * direction)


# NT-Xent.


def test_nt_xent_is_the_cross_entropy_of_finding_the_other_view(x64):
    z = unit(0, 12, 4)
    logits = np.where(np.eye(12, dtype=bool), -1e30, z @ z.T / 0.5)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(12) ^ 1)
    losses = nt_xent_loss(jnp.asarray(z).reshape(6, 2, 4))
    np.testing.assert_allclose(losses, expected.reshape(6, 2).mean(1), rtol=1e-12)


def test_nt_xent_refuses_one_view(unchecked):
    for shape in ((4, 3), (4, 1, 3)):
        with pytest.raises(ValueError, match="2 views or more, got"):
            nt_xent_loss(jnp.ones(shape))


# N-pairs.


def n_pairs_by_loops(z, labels):
    losses = np.zeros(len(z))
    for i, mine in enumerate(labels):
        positives = [p for p, label in enumerate(labels) if label == mine and p != i]
        if positives:
            first = z[i] @ z[positives[0]]
            negatives = [z[i] @ z[n] for n, label in enumerate(labels) if label != mine]
            losses[i] = np.log(np.exp(first) + np.exp(negatives).sum()) - first
    return losses


@pytest.mark.parametrize("options", [{}, {"block_size": 3}])
def test_n_pairs_equals_the_loop(options, x64):
    z = unit(0, 8, 5)
    n_pairs = jax.jit(functools.partial(n_pairs_loss, **options))
    losses = n_pairs(z, LABELS)
    np.testing.assert_allclose(losses, n_pairs_by_loops(z, LABELS), atol=1e-12)
    np.testing.assert_allclose(n_pairs(z[:, None], LABELS), losses, rtol=1e-14)


def test_n_pairs_refuses_more_views(unchecked):
    with pytest.raises(ValueError, match=r"takes one view: \[batch, dim\], got \(4, 2, 3\)"):
        n_pairs_loss(jnp.ones((4, 2, 3)), jnp.zeros(4, int))


# Triplet.


def triplets_by_loops(z, labels, margin):
    """`[rows]`: the mean over the triplets of each anchor."""
    losses = np.zeros(len(z))
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if labels[p] == labels[i] and p != i]
        negatives = [n for n in range(len(z)) if labels[n] != labels[i]]
        terms = [
            max(0, np.sum((z[i] - z[p]) ** 2) - np.sum((z[i] - z[n]) ** 2) + margin)
            for p in positives
            for n in negatives
        ]
        losses[i] = np.mean(terms) if terms else 0
    return losses


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_triplet_equals_the_loops(temperature, views, x64):
    z = unit(1, 8, views, 3) * (1 + np.arange(8)[:, None, None] / 8)  # of any length
    rows = triplets_by_loops(z.reshape(-1, 3), LABELS.repeat(views), 2 * temperature)
    losses = triplets(z, LABELS, temperature=temperature)
    np.testing.assert_allclose(losses, rows.reshape(8, views).mean(1), atol=1e-12)


def test_triplet_gradient_equals_finite_differences(x64):
    loss = functools.partial(triplets, labels=LABELS)
    for seed in range(5):
        numeric, gradient = along(loss, jnp.asarray(unit(1, 8, 2, 3)), unit(seed, 8, 2, 3))
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


def test_triplet_by_the_temperature_counts_the_triplets_within_the_margin(x64):
    z = unit(1, 8, 3)
    slope = jax.grad(lambda t: triplets(z, LABELS, temperature=t).sum())(0.1)
    above, below = (triplets_by_loops(z, LABELS, 0.2 + h).sum() for h in (2e-6, -2e-6))
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-6)


def test_triplet_sharded(mesh_of, x64):
    z = unit(2, 8, 2, 3)
    weights = np.arange(8.0)

    def total(x, loss):
        return (loss(x, LABELS) * weights).sum()

    mapped = jax.shard_map(
        functools.partial(triplet_loss, axis_name="data"),
        mesh=mesh_of(4),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    value, gradient = jax.value_and_grad(total)(z, triplets)
    sharded = jax.jit(jax.value_and_grad(functools.partial(total, loss=mapped)))(z)
    np.testing.assert_allclose(sharded[0], value, rtol=1e-12)
    np.testing.assert_allclose(sharded[1], gradient, atol=1e-12)
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("classes", [1, 8])
def test_triplet_without_positives_or_negatives_is_0(classes):
    features = jnp.asarray(unit(0, 8, 3), jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: triplets(x, np.arange(8) % classes).sum())(
        features
    )
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "loss",
    [
        n_pairs_loss,
        triplet_loss,
        lambda x, labels: large_margin_softmax(x, jnp.ones((5, 3)), labels),
    ],
)
def test_losses_of_classes_refuse_no_labels(loss, unchecked):
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(4,\), got None"):
        loss(jnp.ones((4, 3)), None)


# Large-margin softmax.


def psi(angle, margin):
    k = np.minimum(np.floor(angle * margin / np.pi), margin - 1)
    return (-1) ** k * np.cos(margin * angle) - 2 * k


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
def test_large_margin_equals_the_angles(margin, x64):
    x, w = np.random.default_rng(0).normal(size=(20, 3)), 2 * unit(1, 5, 3)
    labels = np.arange(20) % 5
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    angles = np.arccos(x @ w.T / lengths)
    own = np.eye(5, dtype=bool)[labels]
    logits = lengths * np.where(own, psi(angles, margin), np.cos(angles))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    losses = large_margin(x, w, labels, margin=margin)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_margin_of_1_is_softmax_cross_entropy(x64):
    x, w = unit(0, 7, 3), unit(1, 4, 3)
    labels = np.arange(7) % 4
    expected = optax.softmax_cross_entropy_with_integer_labels(x @ w.T, labels)
    losses = large_margin(x, w, labels, margin=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("margin", [2, 4])
def test_large_margin_gradients_equal_finite_differences(margin, x64):
    x, w = jnp.asarray(2 * unit(0, 9, 3)), jnp.asarray(unit(1, 4, 3))
    labels = np.arange(9) % 4
    by_x = along(lambda x: large_margin(x, w, labels, margin=margin), x, unit(2, 9, 3))
    by_w = along(lambda w: large_margin(x, w, labels, margin=margin), w, unit(3, 4, 3))
    for numeric, gradient in (by_x, by_w):
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


def test_large_margin_is_finite_at_every_angle_and_length():
    """Features of length 0, along their class weights and against them."""
    w = jnp.eye(3)
    x = jnp.concatenate([jnp.zeros((1, 3)), w, -w, 1e3 * w])
    labels = jnp.concatenate([jnp.zeros(1, int), *[jnp.arange(3)] * 3])
    losses, gradients = jax.vmap(
        jax.value_and_grad(lambda x, y: large_margin_softmax(x[None], w, y[None])[0])
    )(x, labels)
    assert np.isfinite(losses).all() and np.isfinite(gradients).all()
    np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(losses[4], np.log(np.exp(-7) + 2) + 7, rtol=1e-6)


@pytest.mark.parametrize(
    ("features", "weights", "margin", "message"),
    [
        ((4, 3), (5, 2), 2, r"\[batch, dim\] and \[classes, dim\], got \(4, 3\) and \(5, 2\)"),
        ((4, 2, 3), (5, 3), 2, r"got \(4, 2, 3\) and \(5, 3\)"),
        ((4, 3), (5, 3), 0, "margin must be a positive integer, got 0"),
        ((4, 3), (5, 3), True, "margin must be a positive integer, got True"),
        ((4, 3), (5, 3), 1.5, r"margin must be a positive integer, got 1\.5"),
    ],
)
def test_large_margin_refuses(features, weights, margin, message, unchecked):
    with pytest.raises(ValueError, match=message):
        large_margin_softmax(jnp.ones(features), jnp.ones(weights), jnp.zeros(4, int), margin)
