"""The training step: sharded equals unsharded, views, batch norm, precision, frozen parts."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from supcon_jax import objectives, parallel, steps
from supcon_jax.data import policies
from supcon_jax.models import Model, ResNet, make_head
from supcon_jax.state import create_state, encoder_of, skipping

# No jitter: the digits have one channel, and its programs take long to compile.
POLICY = policies.make_policy(
    "crop_flip", size=8, crop_area=(0.5, 1.0), crop_ratio=(0.75, 1.33), shift=1, flip=0.5
)
AUGMENT = partial(policies.make_views, mean=(0.3,), std=(0.4,))


class TinyEncoder(nn.Module):
    """Two convolutions with batch norm: what matters here, and compiled in a second."""

    axis_name: str | None = None
    dtype: Any = None
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images, train):
        x = images
        for filters in (8, 16):
            x = nn.Conv(filters, (3, 3), strides=2, use_bias=False, dtype=self.dtype)(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
                )(x)
            x = nn.relu(x)
        return x.mean((1, 2))


COLLECTIVES = {"psum", "psum_invariant", "all_gather", "all_gather_invariant", "reduce_scatter"}
COLLECTIVES |= {"ppermute", "all_to_all", "pmax", "pmin"}


def digits(count):
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels[:count].reshape(-1, 1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    positions = np.arange(count, dtype=np.int32)
    return {"image": images, "label": labels[:count].astype(np.int32), "position": positions}


def make(
    *,
    views=2,
    objective="contrastive",
    axis_name=parallel.AXIS,
    batch_norm=parallel.AXIS,
    learning_rate=1.0,
    dtype=None,
    frozen=(),
    loss_scale=1.0,
    resnet=False,
    options=None,
    normalizing=True,
    micro_batches=1,
    unroll=False,
    average=0.0,
    queue=None,
    follow=None,
    mix="none",
):
    """A state in the widest type on, and its step; a learning rate of 1 gives the gradient."""
    if resnet:
        encoder = ResNet(18, width=0.0625, stem="cifar", axis_name=batch_norm, dtype=dtype)
    else:
        encoder = TinyEncoder(batch_norm, dtype, normalizing)
    name = "projection" if objective == "contrastive" else "classifier"
    head = make_head(name, classes=10, layers=(16,), dtype=dtype)
    model = Model(encoder, head, frozen=frozen)
    tx = optax.sgd(learning_rate)
    state = create_state(model, tx, jax.random.key(0), (8, 8, 1), average=average > 0, queue=queue)
    if jax.config.read("jax_enable_x64"):
        wide = partial(jax.tree.map, lambda x: x.astype(np.float64) if x.dtype == np.float32 else x)
        state = state.replace(
            params=wide(state.params),
            frozen=wide(state.frozen),
            batch_stats=wide(state.batch_stats),
            aux=wide(state.aux),
        )
    step = partial(
        steps.train_step,
        model=model,
        tx=tx,
        objective=partial(objectives.OBJECTIVES[objective], axis_name=axis_name, **(options or {})),
        augment=partial(wide_augment, views=views, mix=mix),
        loss_scale=loss_scale,
        micro_batches=micro_batches,
        unroll=unroll,
        independent=objective in objectives.INDEPENDENT,
        average=average,
        follow=follow,
        axis_name=axis_name,
    )
    return state, step


def wide_augment(keys, batch, *, views, mix="none"):
    """Views in the widest type that is on, so that rounding does not hide anything."""
    made = AUGMENT(keys, batch, policies=[POLICY] * views, mix=mix)
    return made.astype(jnp.result_type(float))


def run(mesh, state, step, batch, count=1):
    """`count` steps on a mesh, or without `shard_map` where there is none."""
    if mesh is None:
        compiled = jax.jit(step)
        for _ in range(count):
            state, metrics = compiled(state, batch)
        return state, metrics
    compiled = parallel.data_parallel(step, mesh)
    state = parallel.replicate(jax.tree.map(jnp.copy, state), mesh)
    for _ in range(count):
        state, metrics = compiled(state, parallel.shard(batch, mesh))
    return state, metrics


def assert_close(actual, expected, relative):
    """Every leaf to `relative` of its own largest entry."""
    leaves = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in leaves:
        a, b = np.asarray(a), np.asarray(b)
        largest = max(np.abs(b).max(), 1e-6)
        worst = np.abs(a - b).max() / largest
        assert worst <= relative, f"{jax.tree_util.keystr(path)}: {worst}"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("objective", "views", "devices"),
    [
        ("contrastive", 2, (4,)),
        ("cross_entropy", 1, (4,)),
        slow("contrastive", 2, (1, 2, 8)),
        slow("contrastive", 1, (4,)),
        slow("contrastive", 3, (4,)),
        slow("cross_entropy", 1, (1, 2, 8)),
    ],
)
def test_sharded_step_equals_unsharded(x64, mesh_of, objective, views, devices):
    batch = digits(32)
    state, step = make(views=views, objective=objective, axis_name=None, batch_norm=None)
    expected, expected_metrics = run(None, state, step, batch)
    gradient = jax.tree.map(lambda a, b: a - b, state.params, expected.params)
    for mesh in map(mesh_of, devices):
        sharded, mapped = make(views=views, objective=objective)
        actual, metrics = run(mesh, sharded, mapped, batch)
        np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=0, atol=1e-12)
        for name in expected_metrics:
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-9, atol=1e-12)
        assert_close(
            jax.tree.map(lambda a, b: a - b, sharded.params, actual.params), gradient, 1e-9
        )
        assert_close(actual.batch_stats, expected.batch_stats, 1e-9)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_step_in_blocks_equals_the_dense_one(x64, mesh_of, exchange):
    batch = digits(32)
    state, step = make(axis_name=None, batch_norm=None, options=dict(positives_cap=4))
    expected, expected_metrics = run(None, state, step, batch)
    options = dict(positives_cap=4, exchange=exchange, block_size=5)
    sharded, mapped = make(options=options)
    actual, metrics = run(mesh_of(4), sharded, mapped, batch)
    gradient = jax.tree.map(lambda a, b: a - b, state.params, expected.params)
    assert_close(jax.tree.map(lambda a, b: a - b, sharded.params, actual.params), gradient, 1e-9)
    without = {"contrastive_accuracy"} if exchange == "ring" else set()
    assert metrics.keys() == expected_metrics.keys() - without
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_sharded_resnet_equals_unsharded(x64, mesh_of):
    batch = digits(16)
    state, step = make(axis_name=None, batch_norm=None, resnet=True)
    expected, _ = run(None, state, step, batch)
    sharded, mapped = make(resnet=True)
    actual, _ = run(mesh_of(4), sharded, mapped, batch)
    assert_close(actual.batch_stats, expected.batch_stats, 1e-9)
    gradient = jax.tree.map(lambda a, b: a - b, state.params, expected.params)
    assert_close(jax.tree.map(lambda a, b: a - b, sharded.params, actual.params), gradient, 1e-9)


@pytest.mark.slow
def test_sharded_training_stays_equal_over_steps(x64, mesh_of):
    batch = digits(32)
    state, step = make(axis_name=None, batch_norm=None, learning_rate=0.1)
    expected, _ = run(None, state, step, batch, 5)
    for mesh in map(mesh_of, (4,)):
        sharded, mapped = make(learning_rate=0.1)
        actual, _ = run(mesh, sharded, mapped, batch, 5)
        assert_close(actual.params, expected.params, 1e-8)


def test_local_batch_norm_equals_normalising_each_slice(x64, mesh_of):
    """Against a model that sees the slices one after the other, with statistics of their own."""
    batch, devices = digits(32), 4
    state, step = make(objective="cross_entropy", views=1, batch_norm=None)
    mesh = mesh_of(devices)
    actual, metrics = run(mesh, state, step, batch)

    _, alone = make(objective="cross_entropy", views=1, axis_name=None, batch_norm=None)
    slices = [{k: v[i * 8 : (i + 1) * 8] for k, v in batch.items()} for i in range(devices)]
    parts = [run(None, state, alone, part) for part in slices]
    states = [part[0].replace(key=0) for part in parts]
    mean = jax.tree.map(lambda *x: sum(x) / devices, *states)
    np.testing.assert_allclose(
        metrics["loss"], np.mean([part[1]["loss"] for part in parts]), atol=1e-12
    )
    assert_close(actual.params, mean.params, 1e-9)
    assert_close(actual.batch_stats, mean.batch_stats, 1e-9)


@pytest.mark.slow
def test_float32_loss_does_not_depend_on_the_device_count(mesh_of):
    batch = digits(32)
    losses = []
    for mesh in map(mesh_of, (1, 8)):
        _, metrics = run(mesh, *make(), batch)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_augmentations_do_not_depend_on_the_device_count(mesh_of):
    batch = digits(16)
    state, _ = make()

    def views(state, batch):
        keys = steps.example_keys(state, batch["position"])
        return AUGMENT(keys, batch, policies=[POLICY] * 2)

    expected = jax.jit(views)(state, batch)
    for mesh in map(mesh_of, (2, 8)):
        actual = parallel.data_parallel_eval(views, mesh)(
            parallel.replicate(state, mesh), parallel.shard(batch, mesh)
        )
        np.testing.assert_array_equal(actual, expected)
    assert np.unique(np.asarray(expected).reshape(32, -1), axis=0).shape[0] == 32


def test_bfloat16_keeps_parameters_statistics_and_loss_in_float32(mesh_of):
    batch = digits(32)
    mesh = mesh_of(1)
    _, exact_metrics = run(mesh, *make(), batch)
    state, metrics = run(mesh, *make(dtype=jnp.bfloat16), batch)
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats, metrics["loss"]))}
    assert kinds == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=0.02)
    assert float(metrics["loss"]) != float(exact_metrics["loss"])  # it did compute in bfloat16


def test_frozen_encoder_is_not_changed_and_has_no_optimizer_state(mesh_of):
    mesh = mesh_of(1)
    state, step = make(objective="cross_entropy", views=1, frozen=("encoder",))
    assert set(state.params) == {"head"}
    after, _ = run(mesh, state, step, digits(32))
    for before, now in (
        (state.frozen, after.frozen),
        (state.batch_stats["encoder"], after.batch_stats["encoder"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, before, now)
    assert not np.array_equal(
        after.params["head"]["Dense_0"]["kernel"], state.params["head"]["Dense_0"]["kernel"]
    )


def test_loss_scale_scales_the_gradient_and_not_the_reported_loss(x64, mesh_of):
    mesh = mesh_of(1)
    state, step = make()
    plain, metrics = run(mesh, state, step, digits(32))
    scaled, scaled_metrics = run(mesh, *make(loss_scale=0.25), digits(32))
    difference = partial(jax.tree.map, lambda a, b: np.asarray(a - b))
    np.testing.assert_allclose(scaled_metrics["loss"], metrics["loss"], rtol=1e-12)
    np.testing.assert_allclose(scaled_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-9)
    quarter = jax.tree.map(lambda x: 0.25 * x, difference(state.params, plain.params))
    assert_close(difference(state.params, scaled.params), quarter, 1e-9)


def collectives_in_branches(jaxpr, inside=False):
    """Names of the collective operations below a condition."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if inside and name in COLLECTIVES:
            found.append(name)
        for inner in jex.core.jaxprs_in_params(equation.params):
            found += collectives_in_branches(inner, inside or name == "cond")
    return found


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_no_condition_has_a_collective_in_it(mesh_of, exchange):
    """A CPU program from the compilation cache does not order such a one with those outside: the
    two are taken for one another, which crashes or mixes their values.
    """
    state, step = make(options=dict(exchange=exchange, block_size=8, positives_cap=4))
    mapped = parallel.data_parallel(step, mesh_of(4))
    jaxpr = jax.make_jaxpr(mapped)(state, digits(32)).jaxpr
    assert "psum" in str(jaxpr)
    assert collectives_in_branches(jaxpr) == []


def test_anchors_without_positives_do_not_dilute_the_loss(x64, mesh_of):
    """One view: the mean is over the samples that have a positive, on all devices together."""
    batch = digits(32)
    batch["label"] = np.concatenate([np.zeros(5, np.int32), np.arange(1, 28, dtype=np.int32)])
    mesh = mesh_of(4)
    _, metrics = run(mesh, *make(views=1), batch)
    np.testing.assert_allclose(metrics["floor"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(metrics["lonely"], 27 / 32, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss"], metrics["floor"] + metrics["excess"], rtol=1e-9)


def test_training_learns_real_digits(mesh_of):
    state, step = make(learning_rate=0.5)
    mesh, batch = mesh_of(1), digits(128)
    compiled = parallel.data_parallel(step, mesh)
    state, first = compiled(parallel.replicate(state, mesh), parallel.shard(batch, mesh))
    for _ in range(60):
        state, last = compiled(state, parallel.shard(batch, mesh))
    assert float(last["excess"]) < 0.8 * float(first["excess"])
    assert float(last["contrastive_accuracy"]) > float(first["contrastive_accuracy"]) + 0.2


# Parameter averages, mixed images.


def test_average_follows_the_parameters_and_is_what_is_evaluated(x64, mesh_of):
    state, step = make(learning_rate=0.1, average=0.15)
    expected, now = state.params, state
    for kept in (0.1, 0.15, 0.15):
        now, _ = run(mesh_of(1), now, step, digits(32))
        expected = jax.tree.map(
            lambda a, p, kept=kept: kept * a + (1 - kept) * p, expected, now.params
        )
    assert_close(now.aux["average"], expected, 1e-12)
    assert now.evaluated is now.aux["average"]
    images = {"image": digits(8)["image"]}
    evaluate = partial(
        steps.eval_step,
        model=step.keywords["model"],
        preprocess=lambda x: x[:, 0].astype(jnp.float64) / 255,
    )
    plain = now.replace(params=expected, aux={})
    np.testing.assert_allclose(
        jax.jit(evaluate)(now, images)["features"], jax.jit(evaluate)(plain, images)["features"]
    )
    assert_close(encoder_of(now)["params"], expected["encoder"], 1e-12)


def test_a_short_run_is_not_evaluated_at_its_initial_values(mesh_of):
    """100 steps with a decay of 0.999, which alone would keep 90 % of them."""
    batch, mesh = digits(256), mesh_of(1)
    options = dict(objective="cross_entropy", views=1, normalizing=False)
    state, step = make(**options, learning_rate=1.0, average=0.999)
    compiled = parallel.data_parallel(step, mesh)
    now, looped = parallel.replicate(jax.tree.map(jnp.copy, state), mesh), state.params
    for t in range(100):
        now, _ = compiled(now, parallel.shard(batch, mesh))
        kept = min(0.999, (1 + t) / (10 + t))
        looped = jax.tree.map(
            lambda a, p, kept=kept: kept * a + (1 - kept) * np.asarray(p), looped, now.params
        )
    assert_close(now.aux["average"], looped, 1e-5)

    preprocess = partial(policies.center_crop, size=8, mean=(0.3,), std=(0.4,))
    scores = jax.jit(partial(steps.eval_step, model=step.keywords["model"], preprocess=preprocess))

    def accuracy(state):
        return np.mean(scores(state, batch)["outputs"].argmax(-1) == batch["label"])

    live = accuracy(now.replace(aux={}))
    assert live > 0.4
    assert accuracy(now) > live - 0.05


def test_without_an_average_there_is_nothing_in_aux(mesh_of):
    state, step = make()
    after, _ = run(mesh_of(1), state, step, digits(8))
    assert after.aux == {} and after.evaluated is after.params


@pytest.mark.parametrize("mix", ["mixup", slow("cutmix")])
def test_mixed_images_are_trained_on_mixed_targets(x64, mesh_of, mix):
    """Against the mean of the losses for either label, weighted by the shares."""
    batch = digits(32)
    share = np.linspace(0, 1, 32, dtype=np.float32)
    pairs = np.concatenate([batch["image"], batch["image"][::-1]], axis=1)
    labels = np.stack([batch["label"], batch["label"][::-1]], axis=1)
    mixed = {**batch, "image": pairs, "label": labels, "share": share}
    state, step = make(objective="cross_entropy", views=1, mix=mix)
    _, metrics = run(mesh_of(4), state, step, mixed)

    keys = steps.example_keys(state, jnp.asarray(batch["position"]))
    augment = jax.jit(partial(wide_augment, views=1, mix=mix))
    views = augment(keys, jax.tree.map(jnp.asarray, mixed))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = make(objective="cross_entropy", views=1, batch_norm=None)[1].keywords["model"]
    logits = np.asarray(jax.jit(partial(steps.forward, model))(variables, views)[0][:, 0])
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(32)
    expected = -share * log_softmax[rows, labels[:, 0]]
    expected -= (1 - share) * log_softmax[rows, labels[:, 1]]
    np.testing.assert_allclose(metrics["loss"], expected.mean(), rtol=1e-6)
    hit = logits.argmax(-1)
    accuracy = share * (hit == labels[:, 0]) + (1 - share) * (hit == labels[:, 1])
    np.testing.assert_allclose(metrics["accuracy"], accuracy.mean(), rtol=1e-6)


def test_step_without_a_finite_gradient_changes_nothing_but_its_number(mesh_of):
    """Of three steps the second is poisoned: the same as two steps, but for the number."""
    state, step = make(learning_rate=0.1, average=0.5)

    def poisoned(keys, batch):
        return wide_augment(keys, batch, views=2) * batch["factor"][:, None, None, None, None]

    compiled = parallel.data_parallel(skipping(partial(step, augment=poisoned)), mesh_of(4))
    now, seen = parallel.replicate(state, mesh_of(4)), []
    for factor in (1.0, np.nan, 1.0):
        factors = np.where(np.arange(32) == 5, factor, 1.0).astype(np.float32)  # one image
        before = jax.tree.map(np.asarray, (now.params, now.batch_stats, now.opt_state, now.aux))
        now, metrics = compiled(now, parallel.shard({**digits(32), "factor": factors}, mesh_of(4)))
        after = (now.params, now.batch_stats, now.opt_state, now.aux)
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
        seen.append((bool(np.isfinite(metrics["grad_norm"])), any(jax.tree.leaves(moved))))
    assert seen == [(True, True), (False, False), (True, True)]
    assert int(now.step) == 3
