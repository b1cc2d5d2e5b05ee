"""The weights and metrics that the trainer writes, against the loss itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.losses import l2_normalize, supcon_loss, triplet_loss
from supcon_jax.metrics import contrastive_metrics

LABELS = jnp.array([0, 1, 0, 2, 0, 1])
ONE_CLASS = jnp.zeros(6, jnp.int32)
OPTIONS = dict(
    loss="supcon",
    temperature=0.1,
    contrast_mode="all",
    denominator_mode="all",
    positives_cap=None,
    queue=None,
    exchange="gather",
    block_size=None,
    axis_name=None,
)


def unit(seed, *shape):
    return l2_normalize(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32))


def weights_and_metrics(features, labels, **options):
    return contrastive_metrics(jnp.ones(len(features)), features, labels, **(OPTIONS | options))


@pytest.mark.parametrize("denominator_mode", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("views", [1, 2])
def test_an_empty_denominator_has_no_weight(views, denominator_mode):
    options = dict(denominator_mode=denominator_mode)
    features = unit(0, 6, views, 4)
    weights, _ = weights_and_metrics(features, ONE_CLASS, **options)
    np.testing.assert_array_equal(weights, float(denominator_mode != "only_negatives"))
    weights, _ = weights_and_metrics(features, LABELS, **options)
    np.testing.assert_array_equal(weights, [1, 1, 1, float(views > 1), 1, 1])
    of_queue = unit(1, 2, 4), jnp.array([5, 0]), jnp.array([True, True])  # has a negative for all
    weights, _ = weights_and_metrics(features, ONE_CLASS, queue=of_queue, **options)
    np.testing.assert_array_equal(weights, 1)


def test_a_triplet_without_a_negative_has_no_weight():
    features = unit(0, 6, 2, 4)
    weights, _ = weights_and_metrics(features, ONE_CLASS, loss="triplet")
    np.testing.assert_array_equal(weights, 0)
    np.testing.assert_array_equal(triplet_loss(features, ONE_CLASS), 0)
    np.testing.assert_array_equal(weights_and_metrics(features, LABELS, loss="triplet")[0], 1)


@pytest.mark.parametrize("denominator_mode", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize(
    "given",
    [
        dict(positives_cap=2),
        dict(queue=(jnp.ones((3, 4)), jnp.array([0, 1, 7]), jnp.array([True, False, True]))),
        {},
    ],
)
def test_collapsed_is_the_loss_of_one_point(given, denominator_mode):
    options = dict(denominator_mode=denominator_mode, **given)
    features = jnp.ones((6, 2, 4))
    _, metrics = weights_and_metrics(features, LABELS, **options)
    expected = supcon_loss(features, LABELS, **options)
    np.testing.assert_allclose(metrics["collapsed"][0], expected, rtol=1e-5)
