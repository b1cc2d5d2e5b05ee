"""Epsilon-SupInfoNCE and hard negatives against loops of their formulas, in every form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import epsilon_sup_infonce_loss, hard_negative_loss, supcon_loss

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODES = ("all", "one_positive", "only_negatives")
VARIANTS = [
    (epsilon_sup_infonce_loss, dict(epsilon=0.7)),
    *((hard_negative_loss, dict(beta=0.6, denominator_mode=mode)) for mode in MODES),
]
FORMS = {
    "dense": {},
    "blocks": dict(block_size=3),
    "ring of blocks": dict(exchange="ring", block_size=3),
}
BATCH, VIEWS, DIM = 8, 2, 5


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(BATCH, VIEWS, DIM))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    queue = rng.normal(size=(5, DIM)), np.array([0, 1, 3, 0, 2]), np.array([1, 1, 1, 0, 1], bool)
    arguments = {
        "labels": dict(labels=np.array([0, 1, 0, 0, 2, 1, 0, 1])),
        "one class": dict(labels=np.zeros(BATCH, int)),
        "queue": dict(labels=np.array([0, 1, 0, 0, 2, 1, 0, 1]), queue=queue),
        "mask": dict(mask=rng.random((BATCH, BATCH)) * (rng.random((BATCH, BATCH)) < 0.5)),
    }
    return features, arguments, rng.normal(size=BATCH)


def every_variant(features, temperature, arrays, **options):
    return jnp.stack(
        [
            loss(features, temperature=temperature, **of_variant, **arrays, **options)
            for loss, of_variant in VARIANTS
        ]
    )


def losses_and_gradients(losses_of, features, weights):
    def total(features, temperature):
        losses = losses_of(features, temperature)
        return (losses @ weights).sum(), losses

    gradients, losses = jax.grad(total, (0, 1), has_aux=True)(features, jnp.asarray(0.2))
    return losses, *gradients


def assert_equals_the_loops(actual, features, given, weights):
    others = {name: value for name, value in given.items() if name != "labels"}
    results = []
    for _, of_variant in VARIANTS:
        of_loops = {"denominator_mode": "one_positive", **of_variant, **others}
        results.append(
            reference.supcon(
                features, given.get("labels"), temperature=0.2, weights=weights, **of_loops
            )
        )
    np.testing.assert_allclose(actual[0], np.stack([r[0] for r in results]), rtol=0, atol=1e-12)
    by_features = sum(r[1] for r in results)
    largest = np.abs(by_features).max()
    np.testing.assert_allclose(actual[1], by_features, rtol=0, atol=1e-11 * (1 + largest))


@pytest.mark.parametrize("form", ["dense", "blocks"])
@pytest.mark.parametrize("option", ["labels", "one class", "queue", "mask"])
def test_alone(option, form, problem):
    features, arguments, weights = problem

    def step(features, arrays, weights):
        of_form = functools.partial(every_variant, arrays=arrays, **FORMS[form])
        return losses_and_gradients(of_form, features, weights)

    actual = quick_jit(step)(features, arguments[option], weights)
    assert np.isfinite(actual[2])
    assert_equals_the_loops(actual, features, arguments[option], weights)


@pytest.mark.parametrize("form", FORMS)
def test_sharded(mesh_of, form, problem):
    features, arguments, weights = problem
    arrays = arguments["queue"]

    def local(features, temperature, arrays):
        return every_variant(features, temperature, arrays, axis_name="data", **FORMS[form])

    def step(features, arrays, weights):
        mapped = jax.shard_map(
            local,
            mesh=mesh_of(4),
            in_specs=(P("data"), P(), dict(labels=P("data"), queue=P())),
            out_specs=P(None, "data"),
        )
        return losses_and_gradients(lambda x, t: mapped(x, t, arrays), features, weights)

    actual = quick_jit(step)(features, arrays, weights)
    assert_equals_the_loops(actual, features, arrays, weights)


def test_temperature_has_the_same_gradient_dense_and_in_blocks(problem):
    features, arguments, weights = problem

    @quick_jit
    def by_temperature(features, arrays):
        return [
            losses_and_gradients(
                functools.partial(every_variant, arrays=arrays, **FORMS[form]), features, weights
            )[2]
            for form in ("dense", "blocks")
        ]

    dense, blocks = by_temperature(features, arguments["labels"])
    np.testing.assert_allclose(blocks, dense, rtol=1e-12)


@pytest.mark.parametrize("block_size", [None, 5])
def test_without_margin_or_hardness_they_are_supcon(block_size, problem):
    features, labels = jnp.asarray(problem[0]), jnp.asarray(problem[1]["labels"]["labels"])
    sincere = supcon_loss(features, labels, denominator_mode="one_positive")
    margin = epsilon_sup_infonce_loss(features, labels, epsilon=0.0, block_size=block_size)
    np.testing.assert_allclose(margin, sincere, rtol=1e-12)
    for mode in MODES:
        plain = supcon_loss(features, labels, denominator_mode=mode)
        soft = hard_negative_loss(
            features, labels, beta=0.0, denominator_mode=mode, block_size=block_size
        )
        np.testing.assert_allclose(soft, plain, rtol=1e-12)


def test_gradient_of_a_gradient_in_blocks(problem):
    """The weights of the negatives stand still there too."""
    features, arguments, direction = problem

    def second_order(features, block_size):
        def slope(features):
            gradient = jax.grad(lambda x: (losses_of(x) @ direction).sum())(features)
            return (gradient * features).sum()

        def losses_of(features):
            labels = jnp.asarray(arguments["labels"]["labels"])
            return every_variant(features, 0.2, dict(labels=labels), block_size=block_size)

        return jax.grad(slope)(features)

    dense, blocks = (
        quick_jit(functools.partial(second_order, block_size=size))(features) for size in (None, 3)
    )
    np.testing.assert_allclose(blocks, dense, rtol=0, atol=1e-11 * np.abs(dense).max())


def test_floor_of_the_margin_is_minus_epsilon():
    labels = jnp.array([0, 0, 1, 1, 2, 2])
    features = jnp.eye(3)[labels]
    losses = epsilon_sup_infonce_loss(features, labels, epsilon=0.5, temperature=0.02)
    np.testing.assert_allclose(losses, -0.5, atol=1e-6)


def test_hard_negatives_push_more():
    """The share of the gradient that the nearest negative gets grows with beta."""
    angles = np.array([0.0, 0.3, 0.9, 2.5])
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    labels = jnp.array([0, 0, 1, 2])

    def share(beta):
        def of_first(negatives):
            whole = jnp.concatenate([features[:2], negatives])
            return hard_negative_loss(whole, labels, beta=beta, temperature=0.5)[0]

        near, far = np.linalg.norm(jax.grad(of_first)(jnp.asarray(features[2:])), axis=1)
        return near / (near + far)

    shares = [share(beta) for beta in (0.0, 0.5, 2.0)]
    assert shares[0] < shares[1] - 0.01 < shares[2] - 0.02


@pytest.mark.parametrize(
    ("loss", "name"), [(epsilon_sup_infonce_loss, "epsilon"), (hard_negative_loss, "beta")]
)
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "much", True])
def test_wrong_strengths_are_refused(loss, name, value, unchecked):
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got {value!r}"):
        loss(jnp.ones((4, 2, 3)), **{name: value})


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("block_size", [None, 4])
def test_strengths_may_be_numbers_of_numpy(number, block_size, unchecked):
    features, labels = jnp.eye(6, dtype=jnp.float32), jnp.array([0, 0, 1, 1, 2, 2])
    for loss, name in ((epsilon_sup_infonce_loss, "epsilon"), (hard_negative_loss, "beta")):
        losses = loss(features, labels, block_size=block_size, **{name: number(1)})
        expected = loss(features, labels, **{name: 1.0})
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
