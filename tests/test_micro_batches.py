"""Gradients in micro-batches: equal to those of the whole batch, in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import assert_close, digits, make, run, slow

from supcon_jax import config as configuration
from supcon_jax import objectives, parallel, stages, steps, supcon_loss
from supcon_jax.validation import validate

BATCH = 32


def pixels(keys, batch):
    """The images as they are: two programs may round the same float32 augmentation differently."""
    return batch["image"].astype(jnp.result_type(float)) / 255


def noisy(keys, batch):
    """Two views that depend on the keys, in the widest type that is on."""
    images = pixels(keys, batch)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, *images.shape[2:]), images.dtype))
    return images + 0.1 * noise(keys)


def step_of(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a - b), before.params, after.params)


# The gradient cache.

DIRECT = dict(axis_name=None, batch_norm=None)  # one device, no `shard_map`


def taken(mesh, micro_batches, **options):
    """Gradient, next state and metrics of a step."""
    state, step = make(**options, micro_batches=micro_batches)
    after, metrics = run(mesh, state, partial(step, augment=noisy), digits(BATCH))
    return step_of(state, after), after, metrics


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, {}),
        (4, {}),
        (4, dict(exchange="ring", block_size=5, positives_cap=4)),
        slow(1, dict(block_size=5)),
        slow(1, dict(positives_cap=4)),
        slow(4, dict(block_size=5)),
        slow(4, dict(positives_cap=4)),
        slow(4, dict(block_size=5, positives_cap=4)),
        slow(4, dict(exchange="ring")),
        slow(4, dict(exchange="ring", block_size=5)),
        slow(4, dict(loss="supcon_in", use_labels=False)),
    ],
)
def test_cached_gradient_equals_that_of_the_whole_batch(x64, mesh_of, devices, options):
    """Without batch norm, whose statistics are those of each micro-batch."""
    of_all = {name: options[name] for name in options if name not in ("exchange", "block_size")}
    expected, _, metrics = taken(None, 1, normalizing=False, options=of_all, **DIRECT)
    actual, _, found = taken(mesh_of(devices), 4, normalizing=False, options=options)
    assert_close(actual, expected, 1e-9)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=0, atol=1e-12)
    for name in found:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-9, atol=1e-12)


def written_out(state, model, batch, devices, parts, shared):
    """Gradient and statistics, with every micro-batch encoded by itself and one loss of them all.

    A shared micro-batch is the j-th part of every device; a local one that of one device.
    """
    places = np.arange(BATCH).reshape(devices, parts, -1)
    rows = places.transpose(1, 0, 2).reshape(1, parts, -1) if shared else places
    views = noisy(steps.example_keys(state, batch["position"]), batch)

    def loss(params):
        outputs, after = jnp.zeros((BATCH, 2, 16)), []
        for of_device in rows:
            stats = state.batch_stats
            for row in of_device:
                variables = {"params": params, "batch_stats": stats}
                made, stats = steps.forward(model, variables, views[row])
                outputs = outputs.at[row].set(made)
            after.append(stats)
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *after)
        return supcon_loss(outputs, batch["label"]).mean(), mean

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)


@pytest.mark.parametrize("shared", [True, False])
def test_cache_normalises_each_part_and_moves_the_statistics_once_after_each(x64, mesh_of, shared):
    batch = jax.tree.map(jnp.asarray, digits(BATCH))
    state, step = make(**DIRECT)
    model = step.keywords["model"]
    (loss, stats), expected = written_out(state, model, batch, 4, 2, shared)
    options = dict(batch_norm=parallel.AXIS if shared else None)
    actual, after, metrics = taken(mesh_of(4), 2, **options)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    assert_close(actual, expected, 1e-9)
    assert_close(after.batch_stats, stats, 1e-9)


def test_cache_works_with_frozen_parts_and_averages(x64, mesh_of):
    options = dict(frozen=("encoder",), average=0.75, normalizing=False, loss_scale=0.25)
    expected, whole, _ = taken(None, 1, **options, **DIRECT)
    actual, parts, _ = taken(mesh_of(4), 4, **options)
    assert set(actual) == {"head"}
    assert_close(actual, expected, 1e-9)
    assert_close(parts.aux["average"], whole.aux["average"], 1e-12)
    jax.tree.map(np.testing.assert_array_equal, parts.frozen, whole.frozen)


def test_cache_in_bfloat16_sums_in_float32(mesh_of):
    """Rounding of activations is that of the direct step; sums over parts add none of theirs."""
    options = dict(dtype=jnp.bfloat16, normalizing=False)
    expected, _, metrics = taken(mesh_of(1), 1, **options)
    actual, after, found = taken(mesh_of(1), 8, **options)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    assert_close(actual, expected, 0.02)


def temporary_bytes(micro_batches, **options):
    """Of the compiled step for 128 images of 64 x 64 pixels; nothing is run."""
    state, step = make(**options, micro_batches=micro_batches, **DIRECT)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, digits(128)))
    batch["image"] = jax.ShapeDtypeStruct((128, 1, 64, 64, 1), jnp.uint8)
    compiled = jax.jit(partial(step, augment=noisy)).lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("resnet", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cache_holds_the_activations_of_a_micro_batch(resnet):
    """And its views: those of all images would be 4 MiB."""
    whole, parts = temporary_bytes(1, resnet=resnet), temporary_bytes(8, resnet=resnet)
    assert parts < whole / 5


@pytest.mark.parametrize("objective", [slow("contrastive"), "cross_entropy"])
def test_parts_without_a_loop_give_the_same(x64, mesh_of, objective):
    views = 2 if objective == "contrastive" else 1
    (expected, looped, _), (actual, unrolled, _) = (
        taken(mesh_of(2), 4, objective=objective, views=views, unroll=unroll)
        for unroll in (False, True)
    )
    assert_close(actual, expected, 1e-9)
    assert_close(unrolled.batch_stats, looped.batch_stats, 1e-9)


# Gradient accumulation.


@pytest.mark.parametrize("devices", [1, 4])
def test_accumulated_gradient_equals_that_of_the_whole_batch(x64, mesh_of, devices):
    """Without batch norm, whose statistics are those of each part."""
    options = dict(objective="cross_entropy", views=1, normalizing=False)
    state, whole = make(**options)
    whole = partial(whole, augment=pixels)
    expected, expected_metrics = run(mesh_of(devices), state, whole, digits(32))
    parts = partial(make(**options, micro_batches=4)[1], augment=pixels)
    actual, metrics = run(mesh_of(devices), state, parts, digits(32))
    assert_close(step_of(state, actual), step_of(state, expected), 1e-9)
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-9)


def test_accumulation_normalises_each_part_and_moves_the_statistics_after_each(x64, mesh_of):
    options = dict(objective="cross_entropy", views=1, axis_name=None, batch_norm=None)
    state, parts = make(**options, micro_batches=4)
    actual, _ = run(None, state, partial(parts, augment=pixels), digits(32))
    alone = partial(make(**options)[1], augment=pixels)
    slices = [{k: v[8 * i : 8 * i + 8] for k, v in digits(32).items()} for i in range(4)]
    after, steps_of_parts = state, []
    for part in slices:
        after, _ = run(None, state.replace(batch_stats=after.batch_stats), alone, part)
        steps_of_parts.append(step_of(state, after))
    mean = jax.tree.map(lambda *x: sum(x) / 4, *steps_of_parts)
    assert_close(step_of(state, actual), mean, 1e-9)
    assert_close(actual.batch_stats, after.batch_stats, 1e-9)


@pytest.mark.parametrize("batch_norm", [parallel.AXIS, None])
def test_accumulation_works_with_global_and_local_batch_norm_on_devices(mesh_of, batch_norm):
    state, step = make(objective="cross_entropy", views=1, batch_norm=batch_norm, micro_batches=2)
    after, metrics = run(mesh_of(4), state, step, digits(32), 2)
    assert np.isfinite(metrics["loss"]) and int(after.step) == 2


# Both.


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_independent_objectives_are_those_whose_examples_do_not_see_each_other(name):
    outputs = jax.random.normal(jax.random.key(0), (8, 2, 10))
    labels = jnp.arange(8) % 2
    losses_of = jax.jit(lambda z, y: objectives.OBJECTIVES[name](z, {"label": y}, {})[0])
    losses, first = losses_of(outputs, labels), losses_of(outputs[:4], labels[:4])
    assert np.allclose(losses[:4], first, rtol=1e-5) == (name in objectives.INDEPENDENT)


@pytest.mark.parametrize("stage", configuration.STAGES)
def test_recipes_accumulate_what_is_independent(monkeypatch, mesh_of, stage):
    monkeypatch.setattr(parallel, "data_parallel", lambda step, mesh: step)
    config = configuration.load("digits")
    config[stage].micro_batches = 4
    validate(config)
    step = stages.build_stage(config, stage, stages.open_data(config), mesh_of(1)).train_step
    assert step.keywords["micro_batches"] == 4
    assert step.keywords["independent"] == (config[stage].objective.name == "cross_entropy")


def inside_loops(jaxpr, inside=False):
    """All equations inside of loops, at any depth."""
    for equation in jaxpr.eqns:
        if inside:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inside_loops(inner, inside or equation.primitive.name == "scan")


@pytest.mark.parametrize(("objective", "views"), [("contrastive", 2), ("cross_entropy", 1)])
def test_gradients_are_summed_over_devices_once(mesh_of, objective, views):
    state, step = make(objective=objective, views=views, normalizing=False, micro_batches=4)
    mapped = parallel.data_parallel(step, mesh_of(4))
    jaxpr = jax.make_jaxpr(mapped)(state, digits(BATCH)).jaxpr
    looped = list(inside_loops(jaxpr))
    assert any(equation.primitive.name == "conv_general_dilated" for equation in looped)
    summed = [equation for equation in looped if equation.primitive.name.startswith("psum")]
    assert all(x.aval.ndim == 0 for equation in summed for x in equation.invars)


@pytest.mark.parametrize(("objective", "views"), [("contrastive", 2), ("cross_entropy", 1)])
def test_parts_that_do_not_divide_the_batch_of_a_device_are_refused(mesh_of, objective, views):
    state, step = make(objective=objective, views=views, micro_batches=3)
    with pytest.raises(ValueError, match="must divide the 8 examples of a device; got 3"):
        run(mesh_of(4), state, step, digits(BATCH))
