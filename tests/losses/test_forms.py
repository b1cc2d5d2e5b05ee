"""Caps, masks and queues, and every form of the computation, against the paper's equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import supcon_in_loss, supcon_loss

LOSSES = {"out": supcon_loss, "in": supcon_in_loss}
LOOPS = {"out": reference.supcon, "in": reference.supcon_in}
MODES = tuple(itertools.product(LOSSES, ("all", "one"), ("all", "one_positive", "only_negatives")))
FEW = MODES[::5]  # each value of each option, at a quarter of the time to compile
FORMS = {
    "dense": {},
    "blocks": dict(block_size=3),  # the last block is not full
    "one block": dict(block_size=99),
    "ring": dict(exchange="ring"),
    "ring of blocks": dict(exchange="ring", block_size=3),
}
ALONE = ("dense", "blocks", "one block")
OPTIONS = ("labels", "none", "cap 0", "cap 2", "queue", "queue, no labels", "mask", "mask, queue")
BATCH, VIEWS, DIM = 8, 2, 5
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def problem(x64):
    """Features, the arguments of every option, and weights of the losses."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(BATCH, VIEWS, DIM))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    labels = np.array([0, 1, 0, 0, 2, 1, 0, 1])
    queue = rng.normal(size=(5, DIM)), np.array([0, 1, 3, 0, 2]), np.array([1, 1, 1, 0, 1], bool)
    mask = rng.random((BATCH, BATCH)) * (rng.random((BATCH, BATCH)) < 0.5)
    mask[3] = 0  # an anchor without positives
    arguments = {
        "labels": dict(labels=labels),
        "none": {},
        "cap 0": dict(labels=labels, positives_cap=0),
        "cap 2": dict(labels=labels, positives_cap=2),
        "queue": dict(labels=labels, queue=queue),
        "queue, no labels": dict(queue=queue),
        "mask": dict(mask=mask),
        "mask, queue": dict(mask=mask, queue=queue),
    }
    return features, arguments, rng.normal(size=BATCH)


def every_mode(modes, features, temperature, arrays, **options):
    return jnp.stack(
        [
            LOSSES[loss](
                features,
                temperature=temperature,
                contrast_mode=contrast,
                denominator_mode=denominator,
                **arrays,
                **options,
            )
            for loss, contrast, denominator in modes
        ]
    )


def losses_and_gradients(losses_of, features, weights):
    """`[modes, batch]`, and the gradients of the sum of all modes by features and temperature."""

    def total(features, temperature):
        losses = losses_of(features, temperature)
        return (losses @ weights).sum(), losses

    gradients, losses = jax.grad(total, (0, 1), has_aux=True)(features, jnp.asarray(0.2))
    return losses, *gradients


def by_loops(modes, features, given, weights, temperature=0.2):
    """`[modes, batch]`, and the gradient of the sum of all modes."""
    results = [
        LOOPS[loss](
            features,
            given.get("labels"),
            temperature=temperature,
            contrast_mode=contrast,
            denominator_mode=denominator,
            weights=weights,
            **{name: value for name, value in given.items() if name != "labels"},
        )
        for loss, contrast, denominator in modes
    ]
    return np.stack([r[0] for r in results]), sum(r[1] for r in results)


def assert_equals_the_loops(actual, modes, features, given, weights, temperature=0.2):
    losses, gradient = by_loops(modes, features, given, weights, temperature)
    np.testing.assert_allclose(actual[0], losses, rtol=1e-12, atol=1e-12)
    largest = np.abs(gradient).max()
    np.testing.assert_allclose(actual[1], gradient, rtol=0, atol=1e-11 * (1 + largest))


def split(given):
    """What is an array, and what is a number."""
    arrays = {name: value for name, value in given.items() if name != "positives_cap"}
    return arrays, {name: value for name, value in given.items() if name not in arrays}


@pytest.mark.parametrize("form", ALONE)
@pytest.mark.parametrize("option", OPTIONS)
def test_alone(option, form, problem):
    features, arguments, weights = problem
    modes = MODES if option == "labels" else FEW
    arrays, numbers = split(arguments[option])

    def step(features, arrays, weights):
        of_form = functools.partial(every_mode, modes, arrays=arrays, **numbers, **FORMS[form])
        return losses_and_gradients(of_form, features, weights)

    actual = quick_jit(step)(features, arrays, weights)
    assert_equals_the_loops(actual, modes, features, arguments[option], weights)


@pytest.mark.parametrize(
    ("batch", "views", "dim", "classes"), [(11, 1, 4, 3), (7, 2, 9, 9), (5, 3, 2, 2), (3, 4, 6, 1)]
)
def test_blocks_on_a_random_grid(batch, views, dim, classes, x64):
    rng = np.random.default_rng(batch)

    @quick_jit
    def step(features, labels, weights, temperature):
        def total(features):
            of_blocks = dict(arrays=dict(labels=labels), block_size=4)
            losses = every_mode(MODES, features, temperature, **of_blocks)
            return (losses @ weights).sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(features)
        return losses, gradient

    for temperature in (0.02, 0.3, 1.0):
        features = rng.normal(size=(batch, views, dim))
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        labels, weights = rng.integers(0, classes, batch), rng.normal(size=batch)
        actual = step(features, labels, weights, temperature)
        given = dict(labels=labels)
        assert_equals_the_loops(actual, MODES, features, given, weights, temperature)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_low_temperature_in_blocks_is_finite_and_exact(length, dtype):
    """With duplicates and opposites; 16-bit features are compared as what they are."""
    rng = np.random.default_rng(5)
    features = rng.normal(size=(6, 2, 5))
    features *= length / np.linalg.norm(features, axis=-1, keepdims=True)
    features[1], features[2] = features[0], -features[0]
    features = jnp.asarray(features, dtype)
    labels = np.array([0, 0, 0, 1, 1, 2])
    modes = MODES if dtype == "float32" else FEW

    @quick_jit
    def step(features, arrays):
        def total(features):
            losses = every_mode(modes, features, 0.01, arrays, block_size=5)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(features)
        return losses, gradient

    losses, gradient = step(features, dict(labels=labels))
    assert losses.dtype == jnp.float32 and gradient.dtype == dtype
    expected = by_loops(modes, features, dict(labels=labels), np.ones(6), 0.01)
    of_similarities = 2e-7 * length**2 / 0.01  # float32 rounds the largest of them so much
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5, atol=of_similarities)
    of_type = {"float32": 2e-4, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    largest, of_gradient = np.abs(expected[1]).max(), max(of_type, of_similarities)
    gradient = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=of_gradient * largest)


@pytest.mark.parametrize("option", ["labels", "queue"])
def test_temperature_has_the_same_gradient_in_every_form(option, problem):
    features, arguments, weights = problem

    @quick_jit
    def by_temperature(arrays):
        forms = [
            functools.partial(every_mode, FEW, arrays=arrays, **FORMS[form])
            for form in ("dense", "blocks")
        ]
        return [losses_and_gradients(form, features, weights)[2] for form in forms]

    dense, blocks = by_temperature(arguments[option])
    np.testing.assert_allclose(blocks, dense, rtol=1e-12)


def test_gradient_of_a_gradient_in_blocks(problem):
    """By the weights of the losses, as for learning to reweight, which starts at weights of 0; and
    by the features. With one view, class 2 has no positive; one class has no negatives.
    """
    features, arguments, direction = problem
    labels = arguments["labels"]["labels"]
    cases = (
        jnp.array([0 * direction, direction, direction]),
        jnp.array([labels, labels, 0 * labels]),
    )

    def second_order(weights, labels, block_size):
        def slope(weights, features):
            gradient = jax.grad(lambda x: (losses_of(x) @ weights).sum())(features)
            return (gradient * direction[:, None, None]).sum()

        def losses_of(features):
            arrays = dict(labels=labels)
            return every_mode(FEW[1:], features, 0.2, arrays, block_size=block_size)

        return jax.grad(slope, (0, 1))(weights, features[:, :1])

    dense, blocks = (
        quick_jit(jax.vmap(functools.partial(second_order, block_size=size)))(*cases)
        for size in (None, 3)
    )
    assert np.abs(dense[0][0]).max() > 1
    for one, other in zip(blocks, dense, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * np.abs(other).max())


@pytest.mark.parametrize("temperature", [0.005, 0.05])
def test_similarities_too_far_apart_for_one_shift(temperature, problem):
    """Of the largest length 10, so that they spread over 10,000 and more."""
    features, arguments, weights = problem
    features[2] *= 10
    labels = arguments["labels"]["labels"]

    def total(features, form):
        return supcon_loss(features, labels, temperature=temperature, **FORMS[form]) @ weights

    labels = jnp.asarray(labels)
    dense, blocks = (
        quick_jit(jax.grad(functools.partial(total, form=form)))(jnp.asarray(features))
        for form in ("dense", "blocks")
    )
    np.testing.assert_allclose(blocks, dense, rtol=0, atol=1e-11 * np.abs(dense).max())


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("classes", [1, BATCH])
def test_no_negatives_or_no_other_positives_in_blocks(classes, views, problem):
    """Anchors without a positive, and positives with nothing in their denominator, count 0."""
    features, _, weights = problem
    given = dict(labels=np.arange(BATCH) % classes)

    def step(features, arrays, weights):
        of_form = functools.partial(every_mode, MODES, arrays=arrays, **FORMS["blocks"])
        return losses_and_gradients(of_form, features, weights)

    actual = quick_jit(step)(features[:, :views], given, weights)
    assert np.isfinite(actual[2])
    assert_equals_the_loops(actual, MODES, features[:, :views], given, weights)


def test_bfloat16_in_blocks():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(32, 2, 16))
    features = jnp.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True), "bfloat16")
    labels = jnp.arange(32) % 5

    def total(features, form):
        return supcon_loss(features, labels, **FORMS[form]).mean()

    dense, blocks = (jax.value_and_grad(total)(features, form) for form in ("dense", "blocks"))
    assert blocks[0].dtype == jnp.float32
    assert blocks[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(blocks[0], dense[0], rtol=1e-5)
    expected = np.asarray(dense[1], np.float32)
    np.testing.assert_allclose(
        np.asarray(blocks[1], np.float32), expected, rtol=0, atol=0.01 * np.abs(expected).max()
    )


@pytest.mark.parametrize("contrast_mode", ["all", "one"])  # the symmetric half, and all blocks
def test_float16_gradient_of_small_slopes(contrast_mode):
    """In a batch of N the mean has slopes of 1/N^2, which a small weight stands for here: float16
    ends at 6e-8. The short features bring their gradient back to where float16 is exact.
    """
    rng = np.random.default_rng(0)
    features = rng.normal(size=(64, 1, 8))
    features *= 0.1 / np.linalg.norm(features, axis=-1, keepdims=True)
    labels = jnp.asarray(rng.integers(0, 10, len(features)))

    @quick_jit
    def gradient(features):
        options = dict(temperature=0.001, contrast_mode=contrast_mode, block_size=16)
        return jax.grad(lambda x: 1e-6 * supcon_loss(x, labels, **options).sum())(features)

    half = jnp.asarray(features, jnp.float16)
    exact, actual = gradient(half.astype(jnp.float32)), gradient(half)
    assert actual.dtype == jnp.float16
    error = np.linalg.norm(actual.astype(np.float32) - exact) / np.linalg.norm(exact)
    assert error < 2e-3


@pytest.mark.parametrize(
    ("option", "form", "devices", "check_vma"),
    [
        *itertools.product(("labels", "cap 2", "queue"), FORMS, [4], [True]),
        ("queue", "ring of blocks", 2, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *itertools.product(["queue"], ("dense", "blocks"), [2], [False]),
                *itertools.product(["cap 2"], ("blocks", "ring of blocks"), [1, 2, 8], [True]),
            )
        ),
        ("none", "ring of blocks", 4, True),
        ("mask, queue", "dense", 4, True),
        ("mask", "blocks", 4, True),
    ],
)
def test_sharded(mesh_of, option, form, devices, check_vma, problem):
    features, arguments, weights = problem
    arrays, numbers = split(arguments[option])
    specs = {name: P() if name == "queue" else P("data") for name in arrays}

    def local(features, temperature, arrays):
        shared = dict(axis_name="data", **numbers, **FORMS[form])
        return every_mode(FEW, features, temperature, arrays, **shared)

    def step(features, arrays, weights):
        mapped = jax.shard_map(
            local,
            mesh=mesh_of(devices),
            in_specs=(P("data"), P(), specs),
            out_specs=P(None, "data"),
            check_vma=check_vma,
        )
        return losses_and_gradients(lambda x, t: mapped(x, t, arrays), features, weights)

    actual = quick_jit(step)(features, arrays, weights)
    assert_equals_the_loops(actual, FEW, features, arguments[option], weights)


@pytest.mark.parametrize("option", ["labels", "mask"])
def test_plain_jit_of_sharded_inputs_in_blocks(mesh_of, option, problem):
    features, arguments, weights = problem

    @quick_jit
    def step(features, arrays, weights):
        of_blocks = functools.partial(every_mode, FEW, arrays=arrays, **FORMS["blocks"])
        return losses_and_gradients(of_blocks, features, weights)

    placed = jax.device_put(
        (features, arguments[option], weights), NamedSharding(mesh_of(8), P("data"))
    )
    assert len(placed[0].sharding.device_set) == 8
    assert_equals_the_loops(step(*placed), FEW, features, arguments[option], weights)


@pytest.mark.parametrize("form", ["dense", "ring of blocks"])
def test_sharded_over_two_axes(mesh_of, form, problem):
    features, arguments, weights = problem
    mesh = jax.sharding.Mesh(mesh_of(4).devices.reshape(2, 2), ("a", "b"))
    labels = arguments["labels"]["labels"]

    def losses_of(features, temperature):
        def local(features, temperature, labels):
            shared = dict(axis_name=("a", "b"), **FORMS[form])
            return every_mode(FEW, features, temperature, dict(labels=labels), **shared)

        both = P(("a", "b"))
        return jax.shard_map(
            local, mesh=mesh, in_specs=(both, P(), both), out_specs=P(None, ("a", "b"))
        )(features, temperature, labels)

    actual = quick_jit(functools.partial(losses_and_gradients, losses_of))(features, weights)
    assert_equals_the_loops(actual, FEW, features, arguments["labels"], weights)


@pytest.mark.parametrize(("spec", "same"), [(P("a"), "'b'"), (P("b"), "'a'"), (P(), "'a', 'b'")])
def test_what_is_the_same_along_one_of_two_axes_is_refused(mesh_of, spec, same):
    mapped = jax.shard_map(
        functools.partial(supcon_loss, axis_name=("a", "b")),
        mesh=jax.sharding.Mesh(mesh_of(4).devices.reshape(2, 2), ("a", "b")),
        in_specs=spec,
        out_specs=P(("a", "b")),
    )
    with pytest.raises(ValueError, match=f"the same on all devices of axis {same}: "):
        mapped(np.ones((4, 2, 3), np.float32))


@pytest.mark.parametrize("form", ["blocks", "ring"])
def test_pmap(form, problem):
    features, arguments, weights = problem
    labels = arguments["labels"]["labels"]

    def local(features, labels, weights):
        losses = every_mode(
            FEW, features, 0.2, dict(labels=labels), axis_name="data", **FORMS[form]
        )
        return (losses @ weights).sum(), losses

    each = jax.pmap(jax.grad(local, has_aux=True), "data", devices=jax.devices()[:4])
    gradient, losses = each(*(x.reshape(4, 2, *x.shape[1:]) for x in (features, labels, weights)))
    losses = losses.transpose(1, 0, 2).reshape(len(FEW), BATCH)
    actual = losses, gradient.reshape(features.shape)
    assert_equals_the_loops(actual, FEW, features, arguments["labels"], weights)


# What the forms are for.


def temporary_bytes(rows, **options):
    """Of loss and gradient by `rows` features of 128 numbers, beside inputs and results."""

    def loss(x, y):
        return supcon_loss(x, y, **options).mean()

    shapes = jax.ShapeDtypeStruct((rows, 128), np.float32), jax.ShapeDtypeStruct((rows,), np.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blocks_take_memory_linear_in_the_batch():
    small, large = (temporary_bytes(rows, block_size=256) for rows in (4096, 16384))
    assert large < 4.5 * small
    assert large < 16384**2 * 4 / 10  # a tenth of one matrix of similarities


def test_auto_is_dense_until_the_similarities_are_large():
    assert temporary_bytes(4096, block_size="auto") > 4096**2 * 4
    assert temporary_bytes(16384, block_size="auto") < 16384**2 * 4 / 4


def test_auto_counts_the_queue():
    def loss(x, y, queue):
        return supcon_loss(x, y, queue=queue, block_size="auto").mean()

    def bytes_with(rows):
        of = jax.ShapeDtypeStruct
        queue = of((rows, 16), np.float32), of((rows,), np.int32), of((rows,), bool)
        shapes = of((2048, 16), np.float32), of((2048,), np.int32), queue
        return quick_jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_with(8192) > 2048 * 8192 * 4
    assert bytes_with(32768) < 256 * 2**20 / 4


def test_auto_knows_that_float64_is_twice_as_large(x64):
    """Rows of which the similarities take 144 MiB in float32, 288 MiB in float64."""

    def has_matrix(dtype):
        features = jax.ShapeDtypeStruct((6144, 4), dtype)
        program = jax.jit(lambda x: supcon_loss(x, block_size="auto")).lower(features).as_text()
        return "tensor<6144x6144x" in program

    assert has_matrix(np.float32) and not has_matrix(np.float64)


def test_ring_never_gathers_features(mesh_of):
    step = jax.shard_map(
        lambda x, y: supcon_loss(x, y, axis_name="data", exchange="ring"),
        mesh=mesh_of(4),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    gradient = jax.jit(jax.grad(lambda x, y: step(x, y).sum()))
    text = gradient.lower(np.ones((64, 2, 8), np.float32), np.zeros(64, np.int32)).as_text()
    assert "collective_permute" in text
    assert not [line for line in text.splitlines() if "all_gather" in line and "xf32" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positives_cap=3), "positives_cap must be None or a multiple of the 2 views, got 3"),
        (dict(positives_cap=-2), "positives_cap must be None or a multiple of the 2 views, got -2"),
        (dict(mask=np.ones((4, 4)), labels=np.zeros(4, int)), "give no labels beside it"),
        (dict(mask=np.ones((4, 4)), positives_cap=2), "give no positives_cap beside it"),
        (
            dict(mask=np.ones((4, 4)), exchange="ring", axis_name="data"),
            "mask needs exchange='gather'",
        ),
        (dict(mask=np.ones((4, 3))), r"mask must be .* \(4, 4\), got \(4, 3\)"),
        (dict(exchange="tree"), "exchange must be one of 'gather', 'ring', got 'tree'"),
        (dict(block_size=0), "block_size must be a positive number, 'auto' or None, got 0"),
        (dict(block_size=True), "block_size must be .* got True"),
        (dict(block_size=2.5), r"block_size must be .* got 2\.5"),
        (dict(block_size="all"), "block_size must be .* got all"),
        (dict(positives_cap=2.5), r"positives_cap must be .* got 2\.5"),
        (dict(exchange="ring"), "exchange='ring' needs the axis_name of the devices"),
        (
            dict(queue=(np.ones((5, 2)), np.zeros(5, int), np.ones(5, bool))),
            r"queue must be features \[queue, 3\], .* got \(5, 2\), \(5,\) and \(5,\)",
        ),
        (
            dict(queue=(np.ones((1, 3)), np.array([2**32]), np.ones(1, bool))),
            "labels of the queue must fit into int32, got 4294967296 to 4294967296: recode",
        ),
        (
            dict(queue=(np.ones((5, 3)), np.zeros(5, int), np.ones(5, bool)), positives_cap=2),
            "give no queue",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        supcon_loss(np.ones((4, 2, 3), np.float32), **options)
