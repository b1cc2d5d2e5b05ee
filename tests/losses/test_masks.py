"""Masks against sets, and the losses that they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import jaccard_mask, overlap_mask, similarity_mask, supcon_loss

TAGS = np.array(
    [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
)
SOFT = np.float32([[0.7, 0.3, 0], [0.2, 0.2, 0.6], [0, 0, 3.0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
MASKS = {overlap_mask: TAGS, jaccard_mask: TAGS, similarity_mask: SOFT}


def by_sets(function, labels):
    expected = np.zeros((len(labels), len(labels)))
    for b, mine in enumerate(labels):
        for c, theirs in enumerate(labels):
            one, other = set(np.flatnonzero(mine)), set(np.flatnonzero(theirs))
            if b == c:
                expected[b, c] = 1
            elif function is overlap_mask:
                expected[b, c] = bool(one & other)
            elif function is jaccard_mask:
                expected[b, c] = len(one & other) / max(len(one | other), 1)
            elif one and other:
                lengths = np.linalg.norm(mine) * np.linalg.norm(theirs)
                expected[b, c] = mine @ theirs / lengths
    return expected


@pytest.mark.parametrize("function", MASKS)
def test_equals_the_sets(function):
    mask = function(jnp.asarray(MASKS[function]))
    assert mask.dtype == jnp.float32
    np.testing.assert_allclose(mask, by_sets(function, MASKS[function]), atol=1e-6)


@pytest.mark.parametrize("function", [overlap_mask, jaccard_mask])
def test_booleans_and_counts_are_the_same_tags(function):
    expected = function(jnp.asarray(TAGS))
    np.testing.assert_array_equal(function(jnp.asarray(TAGS, bool)), expected)
    np.testing.assert_array_equal(function(jnp.asarray(3 * TAGS)), expected)


@pytest.mark.parametrize("function", MASKS)
def test_one_hot_labels_give_the_loss_of_the_labels(function):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32)
    labels = jnp.array([0, 2, 0, 1, 2, 0])
    mask = function(jnp.eye(3)[labels])
    np.testing.assert_allclose(
        supcon_loss(features, mask=mask), supcon_loss(features, labels), rtol=1e-6
    )


@pytest.mark.parametrize("function", MASKS)
def test_sharded(mesh_of, function):
    labels = jnp.asarray(MASKS[function])
    mapped = jax.shard_map(
        functools.partial(function, axis_name="data"),
        mesh=mesh_of(2),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(mapped(labels), by_sets(function, MASKS[function]), atol=1e-6)


@pytest.mark.parametrize("function", MASKS)
def test_class_ids_are_refused(function, unchecked):
    with pytest.raises(ValueError, match=r"labels must be \[batch, classes\], got shape \(4,\)"):
        function(jnp.zeros(4))
