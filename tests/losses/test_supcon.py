"""The losses against the paper's equations, published values, and themselves in other clothes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import l2_normalize, supcon_in_loss, supcon_loss

LOSSES = {"out": supcon_loss, "in": supcon_in_loss}
LOOPS = {"out": reference.supcon, "in": reference.supcon_in}
CONTRAST_MODES = ("all", "one")
DENOMINATOR_MODES = ("all", "one_positive", "only_negatives")
COMPILED = {
    name: jax.jit(loss, static_argnames=("contrast_mode", "denominator_mode", "precision"))
    for name, loss in LOSSES.items()
}
MODES = tuple(itertools.product(LOSSES, CONTRAST_MODES, DENOMINATOR_MODES))
# Optimising these programs takes far longer than running them does.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FEW = MODES[::5]  # each value of each option, at a quarter of the time to compile


def every_mode(features, labels, temperature=0.1, *, modes=MODES, **kwargs):
    """`[modes, batch]`: compiling all modes together costs a fraction of one after the other."""
    return jnp.stack(
        [
            LOSSES[loss](
                features,
                labels,
                temperature=temperature,
                contrast_mode=contrast,
                denominator_mode=denominator,
                **kwargs,
            )
            for loss, contrast, denominator in modes
        ]
    )


@functools.partial(quick_jit, static_argnames="modes")
def differentiate(features, labels, temperature, weights, *, modes=MODES):
    """Losses `[modes, batch]`; each mode's gradients of sum(weights * losses), by the features and
    by the temperature. The tests share a few shapes, for each of which this is compiled once.
    """
    losses, pull_back = jax.vjp(
        lambda x, t: every_mode(x, labels, t, modes=modes), features, temperature
    )
    one_mode_each = jnp.einsum("mn,b->mnb", jnp.eye(len(modes)), weights).astype(losses.dtype)
    return losses, *jax.vmap(pull_back)(one_mode_each)


def losses_and_gradients(features, labels, temperature=0.1, weights=None, modes=MODES):
    weights = np.ones(len(features)) if weights is None else weights
    return differentiate(features, labels, temperature, weights, modes=modes)[:2]


def losses_of(features, labels, temperature=0.1):
    return losses_and_gradients(features, labels, temperature)[0]


def by_loops(features, labels, temperature=0.1, weights=None, modes=MODES):
    """What `losses_and_gradients` must return."""
    results = [
        LOOPS[loss](
            features,
            labels,
            temperature=temperature,
            contrast_mode=contrast,
            denominator_mode=denominator,
            weights=weights,
        )
        for loss, contrast, denominator in modes
    ]
    return tuple(np.stack(parts) for parts in zip(*results, strict=True))


def assert_every_mode_close(actual, expected, *, of_value=0.0, of_largest=0.0, modes=MODES):
    """|actual - expected| <= of_value (1 + |expected|) + of_largest (1 + max|expected|)."""
    for mode, one, other in zip(modes, actual, expected, strict=True):
        atol = of_value + of_largest * (1 + np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=of_value, atol=atol, err_msg=str(mode))


def random_features(seed, *shape):
    features = np.random.default_rng(seed).normal(size=shape)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def random_labels(seed, batch, classes):
    return np.random.default_rng(seed).integers(0, classes, batch).astype(np.int32)


# The paper's equations.


SHAPES = {1: (12, 1, 5), 2: (6, 2, 5), 3: (4, 3, 7), 4: (3, 4, 2)}


@pytest.fixture
def batch(x64):
    return random_features(0, *SHAPES[2]), random_labels(0, 6, 3)


@pytest.mark.parametrize(
    ("views", "labelled"), [(1, True), (2, True), (3, True), (4, True), (3, False)]
)
def test_float64_equals_the_loops(views, labelled, x64):
    shape = SHAPES[views]
    rng = np.random.default_rng(views)
    for classes, temperature in [(2, 0.1), (4, 0.05), (1, 1.0), (9, 0.5), (3, 0.02)]:
        features = random_features(classes, *shape)
        labels = random_labels(classes, shape[0], classes) if labelled else None
        weights = rng.normal(size=shape[0])
        losses, gradients = losses_and_gradients(features, labels, temperature, weights)
        expected = by_loops(features, labels, temperature, weights)
        assert losses.dtype == gradients.dtype == jnp.float64
        assert_every_mode_close(losses, expected[0], of_value=1e-12)
        assert_every_mode_close(gradients, expected[1], of_largest=1e-11)


def test_float32_equals_the_loops():
    shape = SHAPES[2]
    weights = np.random.default_rng(0).normal(size=shape[0])
    for seed, temperature in enumerate([0.05, 0.1, 0.2, 0.5, 1.0]):
        features = random_features(seed, *shape).astype(np.float32)
        labels = random_labels(seed, shape[0], 1 + seed)
        losses, gradients = losses_and_gradients(features, labels, temperature, weights)
        expected = by_loops(features, labels, temperature, weights)
        assert losses.dtype == gradients.dtype == jnp.float32
        assert_every_mode_close(losses, expected[0], of_value=1e-5)
        assert_every_mode_close(gradients, expected[1], of_largest=2e-4)


def test_gradient_equals_finite_differences(batch):
    features, labels = batch
    weights = np.random.default_rng(1).normal(size=len(features))
    _, gradients = losses_and_gradients(features, labels, 0.3, weights)
    for seed in range(5):
        along = random_features(seed, *features.shape)
        above, below = (losses_of(features + h * along, labels, 0.3) for h in (1e-5, -1e-5))
        slopes = (above - below) @ weights / 2e-5
        assert_every_mode_close(np.einsum("mbvd,bvd->m", gradients, along), slopes, of_value=1e-7)


def test_gradient_of_the_loops_equals_their_finite_differences(batch):
    features, labels = batch
    weights = np.random.default_rng(1).normal(size=len(features))
    along = random_features(2, *features.shape)
    above, below = (by_loops(features + h * along, labels, 0.3)[0] for h in (1e-5, -1e-5))
    _, gradients = by_loops(features, labels, 0.3, weights)
    slopes = (above - below) @ weights / 2e-5
    assert_every_mode_close(np.einsum("mbvd,bvd->m", gradients, along), slopes, of_value=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_by_the_anchor_is_equation_4(loss, x64):
    # With one anchor view a sample, z_i enters the loss of sample i as the anchor alone: it is not
    # in its own A(i). So the diagonal of the Jacobian has the contrast side held still.
    features, labels = random_features(0, 7, 2, 4), random_labels(0, 7, 3)
    one_view = functools.partial(COMPILED[loss], temperature=0.2, contrast_mode="one")
    jacobian = jax.jacrev(one_view)(features, labels)
    z, y = features.reshape(14, 4), labels.repeat(2)
    for b in range(7):
        expected = reference.anchor_gradient(z, y, 2 * b, 0.2, inside=loss == "in")
        np.testing.assert_allclose(jacobian[b, b, 0], expected, rtol=1e-11, atol=1e-11)


# Values published with the authors' code: google-research/google-research, supcon/losses_test.py.
# Theirs are multiplied by the temperature unless it is 1; ours never are. With one view theirs are
# divided by |P(i)| twice, so of these cases only those where |P(i)| <= 1 can be compared.

TETRAHEDRON = np.array(
    [
        [[0, 0, 1], [0, 2 * np.sqrt(2) / 3, -1 / 3]],
        [
            [np.sqrt(6) / 3, -np.sqrt(2) / 3, -1 / 3],
            [-np.sqrt(6) / 3, -np.sqrt(2) / 3, -1 / 3],
        ],
    ],
    np.float32,
)
UNNORMALISED = np.array(
    [
        [[0.01, 0.02, 0.14], [0.38, 0.61, 0.50]],
        [[0.86, 0.97, 0.33], [0.26, 0.68, 0.45]],
        [[0.32, 0.64, 0.28], [0.45, 0.74, 0.73]],
    ],
    np.float32,
)


@pytest.mark.parametrize("labels", [None, np.arange(2)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_published_tetrahedron(labels, temperature):
    losses = COMPILED["out"](TETRAHEDRON, labels, temperature=temperature)
    np.testing.assert_allclose(losses, [1.098612, 1.098612], atol=1e-6)


def test_published_contrast_modes():
    features = np.array([[[0, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, -1, 0]]], np.float32)
    all_views = COMPILED["out"](features, temperature=1.0)
    one_view = COMPILED["out"](features, temperature=1.0, contrast_mode="one")
    np.testing.assert_allclose(all_views.mean(), 0.9803035, atol=1e-6)
    np.testing.assert_allclose(one_view.mean(), 1.098612, atol=1e-6)


def test_published_labels_with_positives():
    features = np.eye(3, dtype=np.float32)[[2, 1, 0], None].repeat(2, axis=1)
    losses = COMPILED["out"](features, np.array([0, 0, 2]), temperature=1.0)
    np.testing.assert_allclose(losses, [1.57149910, 1.57149910, 0.90483244], atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "denominator_mode", "expected"),
    [
        ("out", "all", [1.6755852, 1.7973773, 1.58471]),
        ("out", "one_positive", [1.1782627, 1.3435497, 1.58471]),
        ("out", "only_negatives", [0.79652834, 1.0154991, 1.3529458]),
        ("in", "all", [1.6356678, 1.7135872, 1.58471]),
        ("in", "one_positive", [1.1571673, 1.2941568, 1.58471]),
        ("in", "only_negatives", [0.756611, 0.93170905, 1.3529458]),
    ],
)
def test_published_denominator_modes(loss, denominator_mode, expected):
    losses = COMPILED[loss](
        UNNORMALISED, np.array([0, 0, 1]), temperature=1.0, denominator_mode=denominator_mode
    )
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "cap", "labels", "expected"),
    [
        ("out", 4, [0, 0, 1], [1.6755852, 1.7973773, 1.58471]),
        ("out", 2, [0, 0, 0], [1.1385298, 1.1824025, 1.1557417]),
        ("out", 0, [0, 0, 1], [1.3769293, 1.0785717, 1.58471]),
        ("in", 4, [0, 0, 1], [1.6356678, 1.7135872, 1.58471]),
        ("in", 2, [0, 0, 0], [1.0986123, 1.0986123, 1.0986123]),
        ("in", 0, [0, 0, 1], [1.3769293, 1.0785717, 1.58471]),
    ],
)
@pytest.mark.parametrize("block_size", [None, 4])
def test_published_caps(loss, cap, labels, expected, block_size):
    losses = LOSSES[loss](
        jnp.asarray(UNNORMALISED),
        jnp.array(labels),
        temperature=1.0,
        positives_cap=cap,
        block_size=block_size,
    )
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_published_one_view(loss):
    losses = COMPILED[loss](UNNORMALISED[:, :1], np.array([1, 1, 2]), temperature=1.0)
    np.testing.assert_allclose(losses, [0.6836923, 1.25127, 0], atol=1e-5)


# Identities.


def modes_with(name):
    return np.array([name in mode for mode in MODES])


def test_jensen_inside_is_never_above_outside(x64):
    out, inside = modes_with("out"), modes_with("in")
    for seed in range(5):  # one view: the loss of a sample is the loss of an anchor
        features, labels = random_features(seed, *SHAPES[1]), random_labels(seed, 12, 3)
        losses = losses_of(features, labels)
        assert (losses[inside] <= losses[out] + 1e-12).all()
        assert (losses[inside] < losses[out] - 1e-3).any()


@pytest.mark.parametrize("labels", [None, np.array([5, -1, 3, 100, 0, 7])])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_views_of_distinct_classes_are_nt_xent(loss, labels, x64):
    features = random_features(0, 6, 2, 4)
    z = features.reshape(12, 4)
    logits = z @ z.T / 0.2
    np.fill_diagonal(logits, -np.inf)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nt_xent = -log_softmax[np.arange(12), np.arange(12) ^ 1].reshape(6, 2).mean(1)
    losses = COMPILED[loss](features, labels, temperature=0.2)
    np.testing.assert_allclose(losses, nt_xent, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_cap_of_0_is_nt_xent_without_the_rest_of_the_class(loss, batch):
    features, labels = batch
    z, y = features.reshape(12, 5), labels.repeat(2)
    expected = np.zeros(12)
    for i in range(12):
        used = [a for a in range(12) if a == i ^ 1 or y[a] != y[i]]
        s = z[i] @ z[used].T / 0.2
        expected[i] = np.log(np.exp(s).sum()) - z[i] @ z[i ^ 1] / 0.2
    one_step = functools.partial(LOSSES[loss], temperature=0.2, positives_cap=0)
    losses = jax.jit(one_step)(features, labels)
    np.testing.assert_allclose(losses, expected.reshape(6, 2).mean(1), rtol=1e-12)


def test_no_labels_are_distinct_labels(x64):
    features = random_features(0, *SHAPES[3])
    losses, gradients = losses_and_gradients(features, None)
    expected = losses_and_gradients(features, np.array([3, 0, 7, -1], np.int32))
    assert_every_mode_close(losses, expected[0], of_value=1e-12)
    assert_every_mode_close(gradients, expected[1], of_largest=1e-12)


@pytest.mark.parametrize("labels", [None, np.arange(10) % 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_identical_features_give_log_of_the_others(loss, labels):
    # HobbitLong/SupContrast, issue 106: the loss of a network that has learned nothing.
    features = np.broadcast_to(np.float32([0.6, 0.0, -0.8]), (10, 2, 3))
    for temperature in [0.01, 0.1, 1.0, 10.0]:
        losses = COMPILED[loss](features, labels, temperature=temperature)
        np.testing.assert_allclose(losses, np.full(10, np.log(19)), rtol=2e-6)


def test_views_as_samples_of_their_own(batch):
    features, labels = batch
    flat = losses_of(features.reshape(12, 1, 5), labels.repeat(2)).reshape(len(MODES), 6, 2)
    losses = losses_of(features, labels)
    for mode, one, of_views in zip(MODES, losses, flat, strict=True):
        expected = of_views.mean(1) if mode[1] == "all" else of_views[:, 0]
        np.testing.assert_allclose(one, expected, rtol=1e-12, atol=1e-12, err_msg=str(mode))


@pytest.mark.parametrize("loss", LOSSES)
def test_two_axes_are_one_view(loss):
    features, labels = random_features(0, 12, 5), random_labels(0, 12, 3)
    expected = COMPILED[loss](features[:, None], labels)
    assert (expected > 0).all()
    np.testing.assert_array_equal(COMPILED[loss](features, labels), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_equals_eager(loss):
    features, labels = jnp.asarray(UNNORMALISED), jnp.array([0, 0, 1])
    expected = COMPILED[loss](features, labels)
    np.testing.assert_allclose(LOSSES[loss](features, labels), expected, rtol=1e-5)


def test_permutation_of_the_batch_permutes_the_losses(batch):
    features, labels = batch
    order = np.random.default_rng(1).permutation(6)
    expected = losses_of(features, labels)[:, order]
    assert_every_mode_close(losses_of(features[order], labels[order]), expected, of_value=1e-12)


def test_rotation_of_the_features_changes_nothing(batch):
    features, labels = batch
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    expected = losses_of(features, labels)
    assert_every_mode_close(losses_of(features @ rotation, labels), expected, of_value=1e-12)


def test_names_of_the_classes_do_not_matter(batch):
    features, labels = batch
    renamed = np.array([2**31 - 1, -7, 0], np.int32)[labels]
    np.testing.assert_array_equal(losses_of(features, renamed), losses_of(features, labels))


def test_temperature_is_a_squared_length(batch):
    features, labels = batch
    expected = losses_of(features, labels, 0.25)
    assert_every_mode_close(losses_of(2 * features, labels, 1.0), expected, of_value=1e-12)


# Finite on every input, and zero where there is nothing to compare with.


def assert_all_finite(*arrays):
    for array in arrays:
        assert np.isfinite(np.asarray(array, np.float32)).all()


@pytest.mark.parametrize(
    ("dtype", "modes"), [(jnp.bfloat16, FEW), (jnp.float16, FEW), (jnp.float32, MODES)]
)
def test_low_temperature_is_finite_and_float32(dtype, modes):
    features = jnp.asarray(random_features(0, *SHAPES[2]), dtype)
    features = features.at[1].set(features[0]).at[2].set(-features[0])  # duplicates, opposites
    labels = np.array([0, 0, 0, 1, 1, 2], np.int32)
    losses, gradients = losses_and_gradients(features, labels, 0.01, modes=modes)
    expected = by_loops(features, labels, 0.01, modes=modes)
    assert losses.dtype == jnp.float32 and gradients.dtype == dtype
    assert_all_finite(losses, gradients)
    # The products of 16-bit features are summed in float32: as near as those of float32 features.
    assert_every_mode_close(losses, expected[0], of_value=1e-5, modes=modes)
    rounding = max(2 * float(jnp.finfo(dtype).eps), 2e-4)
    gradients = gradients.astype(np.float32)
    assert_every_mode_close(gradients, expected[1], of_largest=rounding, modes=modes)


def test_unnormalised_features_with_an_outlier(batch):
    features, labels = batch
    features = 30 * features
    features[0, 0] *= 1e4
    expected = by_loops(features, labels)
    losses, gradients = losses_and_gradients(features, labels)
    assert_every_mode_close(losses, expected[0], of_value=1e-12)
    assert_every_mode_close(gradients, expected[1], of_largest=1e-11)


def test_unnormalised_float32_features_with_an_outlier():
    features, labels = 30 * random_features(0, *SHAPES[2]), random_labels(0, 6, 3)
    features[0, 0] *= 1e4
    features = features.astype(np.float32)
    losses, gradients = losses_and_gradients(features, labels)
    assert_all_finite(losses, gradients)
    # The similarities are up to 1e8, so rounding them alone moves the losses of other samples.
    assert_every_mode_close(losses, by_loops(features, labels)[0], of_value=1e-5, of_largest=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_products_near_the_ends_of_float32_are_finite(size):
    features = np.sign(random_features(0, *SHAPES[2])).astype(np.float32) * np.float32(size)
    assert_all_finite(*losses_and_gradients(features, random_labels(0, 6, 3), 1.0))


def test_an_anchor_without_positives_counts_nothing(x64):
    labels = np.array([0, 0, 1, 1, 2, 3, 3, 3, 0, 1, 1, 0], np.int32)  # class 2 has one sample
    weights = (labels == 2).astype(float)
    features = random_features(0, *SHAPES[1])
    losses, gradients = losses_and_gradients(features, labels, 0.1, weights)
    np.testing.assert_array_equal(losses[:, 4], 0)
    np.testing.assert_array_equal(gradients, 0)
    assert (np.delete(losses, 4, axis=1) != 0).all()


def test_a_batch_without_positives_is_zero(x64):
    features = random_features(0, *SHAPES[1])
    losses, gradients = losses_and_gradients(features, np.arange(12, dtype=np.int32))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradients, 0)


def test_a_batch_of_one_class(batch):
    losses, gradients = losses_and_gradients(batch[0], np.zeros(6, np.int32))
    empty = modes_with("only_negatives")  # no negative: nothing in the denominator
    itself = modes_with("one_positive")  # the ratio is 1
    np.testing.assert_array_equal(losses[empty], 0)
    np.testing.assert_array_equal(gradients[empty], 0)
    np.testing.assert_allclose(losses[itself], 0, atol=1e-12)
    np.testing.assert_allclose(gradients[itself], 0, atol=1e-12)
    # Eq. 3 is ln|P(i)| for every embedding, so it teaches nothing; Eq. 2 still has a gradient.
    out, inside = (modes_with(name) & ~empty & ~itself for name in ("out", "in"))
    np.testing.assert_allclose(losses[inside], np.log(11), rtol=1e-12)
    np.testing.assert_allclose(gradients[inside], 0, atol=1e-11)
    assert (losses[out] > np.log(11) + 0.1).all()


@pytest.mark.parametrize("loss", [supcon_loss, supcon_in_loss])
def test_no_nan_on_the_way_either(loss):
    # Hidden by a later select, it would still stop everyone who runs with jax_debug_nans.
    features, labels = jnp.asarray(UNNORMALISED[:, 0]), jnp.zeros(3, jnp.int32)
    with jax.debug_nans(True):
        gradient = jax.grad(lambda x: loss(x, labels, denominator_mode="only_negatives").sum())
        np.testing.assert_array_equal(gradient(features), 0)


@pytest.mark.parametrize("labels", [None, np.zeros(1, np.int32)])
@pytest.mark.parametrize("views", [1, 2])
def test_a_batch_of_one_sample_is_zero(views, labels):
    features = random_features(0, 1, views, 3).astype(np.float32)
    losses, gradients = losses_and_gradients(features, labels, modes=FEW)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)


# Temperature and precision.


def test_temperature_is_differentiable(batch):
    features, labels = batch
    weights = np.random.default_rng(1).normal(size=len(features))
    _, _, slopes = differentiate(features, labels, 0.3, weights, modes=MODES)
    above, below = (losses_of(features, labels, 0.3 + h) for h in (1e-5, -1e-5))
    assert_every_mode_close(slopes, (above - below) @ weights / 2e-5, of_value=1e-7)


@pytest.mark.parametrize("kind", [float, np.float64, jnp.asarray])
def test_temperature_may_be_any_constant_of_a_compiled_function(kind):
    temperature = kind(0.3)
    losses = jax.jit(lambda x: supcon_loss(x, temperature=temperature))(UNNORMALISED)
    expected = COMPILED["out"](UNNORMALISED, temperature=0.3)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (jnp.float32, None, "HIGHEST"),
        (jnp.bfloat16, None, "DEFAULT"),
        (jnp.float32, "default", "DEFAULT"),
    ],
)
@pytest.mark.parametrize("loss", [supcon_loss, supcon_in_loss])
def test_precision_of_the_products(loss, dtype, precision, expected):
    # On a CPU all precisions are the same, so this reads the program and not the result.
    gradient = jax.grad(lambda x: loss(x, precision=precision).sum())
    program = jax.jit(gradient).lower(jnp.ones((4, 2, 3), dtype)).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3  # similarities, and the gradients of their two factors
    for line in products:
        stated = "HIGHEST" if "precision = [HIGHEST, HIGHEST]" in line else "DEFAULT"
        assert stated == expected, line


# Many devices.


@pytest.fixture
def problem(x64):
    """Inputs, a parameter matrix that turns them into features, labels, weights of the losses."""
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=(16, 2, 6)), rng.normal(size=(6, 4))
    # Some classes lie on one device, some on several; one has a single sample.
    labels = np.array([0, 0, 1, 2, 1, 1, 3, 0, 1, 0, 4, 4, 2, 0, 1, 1], np.int32)
    return x, matrix, labels, rng.normal(size=(len(MODES), 16))


def weighted_sum(x, matrix, labels, weights, modes, axis_name=None):
    losses = every_mode(l2_normalize(x @ matrix), labels, modes=modes, axis_name=axis_name)
    return (weights * losses).sum(), losses


def assert_equals_the_loops(modes, actual, x, matrix, labels, weights):
    """Losses, and gradients by x and by the matrix, of which the loops know those by features."""
    product = x @ matrix
    length = np.linalg.norm(product, axis=-1, keepdims=True)
    z = product / length
    losses, by_z = np.zeros((len(modes), len(x))), np.zeros_like(z)
    for m, (loss, contrast, denominator) in enumerate(modes):
        losses[m], gradient = LOOPS[loss](
            z,
            labels,
            contrast_mode=contrast,
            denominator_mode=denominator,
            weights=weights[m],
        )
        by_z += gradient
    by_product = (by_z - z * (z * by_z).sum(-1, keepdims=True)) / length
    expected = by_product @ matrix.T, np.einsum("bvi,bvo->io", x, by_product)
    assert_every_mode_close(actual[0], losses, of_value=1e-12, modes=modes)
    for one, other in zip(actual[1:], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * np.abs(other).max())


IN_SPECS = (P("data"), P(), P("data"), P(None, "data"))
OUT_SPECS = (P(None, "data"), P("data"), P())


def summed_loss_step(x, matrix, labels, weights, *, modes):
    """Under check_vma=True the sum over devices is inside of the differentiated function."""

    def loss(x, matrix):
        total, losses = weighted_sum(x, matrix, labels, weights, modes, "data")
        return jax.lax.psum(total, "data"), losses

    (_, losses), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, matrix)
    return losses, *gradients


def averaged_gradient_step(x, matrix, labels, weights, *, modes):
    """Without it each device differentiates its own loss, and the gradients are averaged after."""
    devices = jax.lax.axis_size("data")
    (_, losses), (by_x, by_matrix) = jax.value_and_grad(weighted_sum, (0, 1), has_aux=True)(
        x, matrix, labels, devices * weights, modes, "data"
    )
    return losses, by_x / devices, jax.lax.pmean(by_matrix, "data")


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("devices", "modes"), [(1, FEW), (2, FEW), (4, FEW), (8, MODES)])
def test_sharded(mesh_of, devices, modes, labelled, problem):
    x, matrix, labels, weights = problem
    arguments = x, matrix, labels if labelled else None, weights[: len(modes)]
    step = jax.shard_map(
        functools.partial(summed_loss_step, modes=modes),
        mesh=mesh_of(devices),
        in_specs=IN_SPECS,
        out_specs=OUT_SPECS,
    )
    assert_equals_the_loops(modes, quick_jit(step)(*arguments), *arguments)


@pytest.mark.parametrize("labelled", [True, False])
def test_sharded_without_check_vma(mesh_of, labelled, problem):
    x, matrix, labels, weights = problem
    arguments = x, matrix, labels if labelled else None, weights[: len(FEW)]
    step = jax.shard_map(
        functools.partial(averaged_gradient_step, modes=FEW),
        mesh=mesh_of(4),
        in_specs=IN_SPECS,
        out_specs=OUT_SPECS,
        check_vma=False,
    )
    assert_equals_the_loops(FEW, quick_jit(step)(*arguments), *arguments)


def test_pmap(mesh_of, problem):
    devices = mesh_of(4).devices
    x, matrix, labels, weights = problem
    weights = weights[: len(FEW)]
    step = jax.pmap(
        functools.partial(averaged_gradient_step, modes=FEW),
        axis_name="data",
        in_axes=(0, None, 0, 1),
        out_axes=(1, 0, 0),
        devices=list(devices),
    )
    losses, by_x, by_matrix = step(
        x.reshape(4, 4, 2, 6), matrix, labels.reshape(4, 4), weights.reshape(-1, 4, 4)
    )
    merged = losses.reshape(-1, 16), by_x.reshape(x.shape), by_matrix[0]
    assert_equals_the_loops(FEW, merged, x, matrix, labels, weights)


def test_plain_jit_of_sharded_inputs(mesh_of, problem):
    x, matrix, labels, weights = problem
    arguments = x, matrix, labels, weights[: len(FEW)]
    mesh = mesh_of(8)
    placed = jax.device_put(arguments, tuple(NamedSharding(mesh, spec) for spec in IN_SPECS))
    loss = functools.partial(weighted_sum, modes=FEW)
    (_, losses), gradients = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*placed)
    assert len(losses.sharding.device_set) == 8
    assert_equals_the_loops(FEW, (losses, *gradients), *arguments)


def test_without_axis_name_each_device_is_alone(mesh_of, batch):
    features, labels = batch
    alone = jax.shard_map(
        functools.partial(every_mode, modes=FEW),
        mesh=mesh_of(2),
        in_specs=(P("data"), P("data")),
        out_specs=P(None, "data"),
    )
    expected = [
        by_loops(features[half], labels[half], modes=FEW)[0] for half in (np.s_[:3], np.s_[3:])
    ]
    actual = quick_jit(alone)(features, labels)
    assert_every_mode_close(actual, np.concatenate(expected, 1), of_value=1e-12, modes=FEW)


@pytest.mark.parametrize("specs", [(P(), P()), (P("data"), P())])
def test_what_is_the_same_on_all_devices_is_refused(mesh_of, specs):
    mapped = jax.shard_map(
        functools.partial(supcon_loss, axis_name="data"),
        mesh=mesh_of(2),
        in_specs=specs,
        out_specs=P("data"),
    )
    # The labels of the second case have the length of a local batch, so only their being the same
    # can be wrong.
    labels = np.zeros(4 if specs[0] == P() else 2, np.int32)
    with pytest.raises(ValueError, match="the same on all devices of axis 'data'"):
        mapped(np.ones((4, 2, 3), np.float32), labels)


# What is refused.


@pytest.mark.parametrize("loss", [supcon_loss, supcon_in_loss])
@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        ((4,), None, {}, r"\[batch, views, dim\] or \[batch, dim\], got shape \(4,\)"),
        ((4, 2, 3, 1), None, {}, r"\[batch, views, dim\].* got shape \(4, 2, 3, 1\)"),
        (
            (4, 2, 3),
            np.zeros(3, int),
            {},
            r"labels must be integers of shape \(4,\), got .* \(3,\)",
        ),
        (
            (4, 2, 3),
            np.zeros((4, 2), int),
            {},
            r"labels must be integers of shape \(4,\), got .* \(4, 2\)",
        ),
        ((4, 2, 3), np.array(0), {}, r"labels must be integers of shape \(4,\), got .* \(\)"),
        (
            (4, 3),
            np.eye(4, dtype=int),
            {},
            r"labels must be integers of shape \(4,\), got .* \(4, 4\)",
        ),
        ((4, 3), None, {"contrast_mode": "two"}, r"contrast_mode.*'all', 'one', got 'two'"),
        (
            (4, 3),
            None,
            {"denominator_mode": "none"},
            r"denominator_mode.*'all', 'one_positive', 'only_negatives', got 'none'",
        ),
        ((4, 3), None, {"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ((4, 3), None, {"temperature": -0.1}, r"temperature must be positive, got -0\.1"),
        ((4, 3), None, {"temperature": np.nan}, r"temperature must be positive, got nan"),
        ((4, 3), None, {"temperature": jnp.array(0.0)}, r"temperature must be positive, got 0\.0"),
        ((4, 3), None, {"temperature": [0.1]}, r"temperature must be one number, got shape \(1,\)"),
        (
            (4, 3),
            np.array([0, 1, 2**32, 2**32 + 1]),
            {},
            r"labels must fit into int32, got 0 to 4294967297: recode them by np\.unique",
        ),
    ],
)
def test_wrong_arguments_are_refused(loss, features, labels, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        loss(jnp.ones(features), labels, **options)


@pytest.mark.parametrize("function", [supcon_loss, supcon_in_loss])
def test_integer_features_are_refused(function, unchecked):
    with pytest.raises(ValueError, match="features must be floating point, got int32"):
        function(np.ones((4, 2, 3), np.int32))


@pytest.mark.parametrize("block_size", [None, 4])
def test_lists_and_numbers_of_numpy_are_taken(block_size, unchecked):
    features, labels = random_features(0, 4, 2, 3).astype(np.float32), [0, 1, 0, 2]
    size = None if block_size is None else np.int64(block_size)
    expected = supcon_loss(jnp.asarray(features), jnp.array(labels), positives_cap=2)
    options = dict(temperature=np.float32(0.1), positives_cap=np.int64(2), block_size=size)
    losses = supcon_loss(features.tolist(), labels, **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    mask = (np.array(labels)[:, None] == labels).astype(float)
    masked = supcon_loss(features, mask=mask.tolist(), block_size=size)
    np.testing.assert_allclose(masked, supcon_loss(features, labels), rtol=1e-5)


def test_large_labels_are_taken_in_64_bits(x64):
    features = jnp.asarray(random_features(0, 4, 3))
    losses = supcon_loss(features, jnp.array([0, 1, 2**32, 0]))
    np.testing.assert_array_equal(losses, supcon_loss(features, jnp.array([0, 1, 2, 0])))


# l2_normalize.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_l2_normalize_has_length_one(dtype):
    x = jnp.asarray(300 * np.random.default_rng(0).normal(size=(5, 3, 8)), dtype)
    y = l2_normalize(x)
    assert y.dtype == dtype
    length = np.linalg.norm(np.asarray(y, np.float64), axis=-1)
    np.testing.assert_allclose(length, 1, atol=float(jnp.finfo(dtype).eps))
    direction = (
        np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=-1)[..., None]
    )
    np.testing.assert_allclose(
        np.asarray(y, np.float64), direction, atol=float(jnp.finfo(dtype).eps)
    )


def test_l2_normalize_gradient_is_equation_17(x64):
    # dz/dw = (I - z z^T) / |w|, supplement of the paper.
    w = np.random.default_rng(0).normal(size=4)
    z, length = w / np.linalg.norm(w), np.linalg.norm(w)
    np.testing.assert_allclose(
        jax.jacrev(l2_normalize)(w), (np.eye(4) - np.outer(z, z)) / length, atol=1e-14
    )


def test_l2_normalize_of_zero():
    zero = jnp.zeros((2, 3))
    np.testing.assert_array_equal(l2_normalize(zero), 0)
    upstream = np.float32([[0, 1, 2], [3, 4, 5]])
    gradient = jax.grad(lambda x: (l2_normalize(x) * upstream).sum())(zero)
    np.testing.assert_allclose(gradient, 1e6 * upstream, rtol=1e-6)


def test_l2_normalize_below_epsilon():
    np.testing.assert_allclose(l2_normalize(jnp.array([3e-8, 4e-8])), [0.03, 0.04], rtol=1e-5)
    np.testing.assert_allclose(l2_normalize(jnp.array([3.0, 4.0]), 100.0), [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("size", [1e20, 1e37])
def test_l2_normalize_of_huge_features(size):
    x, upstream = jnp.array([3.0, -4.0]) * np.float32(size / 4), np.float32([1, 2])
    np.testing.assert_allclose(l2_normalize(x), [0.6, -0.8], rtol=1e-6)
    gradient = jax.grad(lambda x: l2_normalize(x) @ upstream)(x)
    z, length = np.array([0.6, -0.8]), 1.25 * size
    np.testing.assert_allclose(
        gradient * size, (upstream - z * (z @ upstream)) * size / length, rtol=1e-5
    )


def test_l2_normalize_takes_lists_and_refuses_integers(unchecked):
    np.testing.assert_allclose(l2_normalize([3.0, 4.0]), [0.6, 0.8], rtol=1e-6)
    double = l2_normalize(np.array([3.0, 4.0]))  # without a warning, which would be an error here
    assert double.dtype == jnp.float32
    with pytest.raises(ValueError, match="x must be floating point, got int32"):
        l2_normalize(jnp.array([1, 2, 3]))
