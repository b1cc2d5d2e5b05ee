"""The momentum encoder and its queue: against a loop that keeps both in plain Python."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_steps import assert_close, digits, make, run, slow, wide_augment

from supcon_jax import momentum, parallel, steps

BATCH, SIZE, DIM = 16, 40, 16  # the queue is no multiple of the batch
TEMPERATURE, DECAY, RATE = 0.5, 0.75, 0.3


def stage(*, use_labels=True, axis_name=parallel.AXIS, views=2, keep_from=0, **options):
    return make(
        learning_rate=RATE,
        views=views,
        axis_name=axis_name,
        batch_norm=axis_name,
        queue=(SIZE, DIM),
        follow=partial(momentum.follow, decay=DECAY, keep_from=keep_from),
        options={
            "contrast_mode": "one",
            "temperature": TEMPERATURE,
            "use_labels": use_labels,
        },
        **options,
    )


def batch_of(step):
    """A batch of its own for each step."""
    everything = digits(BATCH * 6)
    rows = slice(step * BATCH, (step + 1) * BATCH)
    return {**{k: v[rows] for k, v in everything.items()}, "position": np.arange(BATCH)}


def loss_of(params, state, views, labels, keys, rows, forward, use_labels):
    """Eq. 2 for the queries: others of the batch, all keys, the rows; a class a sample or label."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    queries = forward(variables, views[:, :1])[0][:, 0]
    own = jnp.arange(BATCH)
    mine = labels if use_labels else own
    contrast = [queries, *jnp.moveaxis(keys, 1, 0)]
    classes = [mine] * len(contrast)
    if rows:
        contrast.append(jnp.stack([feature for feature, _ in rows]))
        classes.append(jnp.array([c if use_labels else -1 for _, c in rows]))
    similar = queries @ jnp.concatenate(contrast).T / TEMPERATURE
    itself = jnp.arange(similar.shape[1])[None] == own[:, None]
    positive = (jnp.concatenate(classes)[None] == mine[:, None]) & ~itself
    log_ratio = similar - jax.nn.logsumexp(similar, 1, where=~itself, keepdims=True)
    return -(jnp.where(positive, log_ratio, 0).sum(1) / positive.sum(1)).mean()


def in_plain_python(state, step, count, *, use_labels=True, views=2, keep_from=0):
    """Parameters, momentum parameters and queue after `count` steps, oldest row first."""
    forward = jax.jit(partial(steps.forward, step.keywords["model"]))
    augment = jax.jit(partial(wide_augment, views=views))
    params, followers, rows = state.params, state.params, deque(maxlen=SIZE)
    losses = []
    for k in range(count):
        batch = jax.tree.map(jnp.asarray, batch_of(k))
        made = augment(steps.example_keys(state, batch["position"]), batch)
        of_keys = {"params": followers, "batch_stats": state.batch_stats}
        keys = forward(of_keys, made[:, 1:])[0]
        loss, grads = jax.value_and_grad(loss_of)(
            params, state, made, batch["label"], keys, list(rows), forward, use_labels
        )
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        followers = jax.tree.map(lambda f, p: DECAY * f + (1 - DECAY) * p, followers, params)
        if k >= keep_from:
            for sample, label in zip(keys, batch["label"], strict=True):
                rows.extend((feature, int(label)) for feature in sample)
        state = state.replace(step=state.step + 1)
        losses.append(float(loss))
    return params, followers, rows, losses


@pytest.mark.parametrize(
    ("devices", "use_labels", "views", "keep_from"),
    [slow(1, True, 2, 0), (4, True, 2, 1), slow(2, False, 2, 0), slow(2, True, 3, 0)],
)
def test_steps_are_those_of_plain_python(x64, mesh_of, devices, use_labels, views, keep_from):
    options = dict(use_labels=use_labels, views=views, keep_from=keep_from)
    state, step = stage(**options)
    compiled = parallel.data_parallel(step, mesh_of(devices))
    now, losses = parallel.replicate(jax.tree.map(jnp.copy, state), mesh_of(devices)), []
    for k in range(4):
        now, metrics = compiled(now, parallel.shard(batch_of(k), mesh_of(devices)))
        losses.append(float(metrics["loss"]))
    plain = stage(axis_name=None, **options)[1]
    params, followers, rows, expected = in_plain_python(state, plain, 4, **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # views in float32
    assert_close(now.params, params, 1e-5)
    assert_close(now.aux["momentum"], followers, 1e-5)
    features, labels, valid = momentum.rows(now.aux["queue"])
    assert valid.all() and len(rows) == SIZE
    order = np.roll(np.arange(SIZE), -int(now.aux["queue"]["next"]))  # oldest first
    np.testing.assert_allclose(features[order], np.stack([f for f, _ in rows]), atol=1e-6)
    np.testing.assert_array_equal(labels[order], [label for _, label in rows])


def test_rows_count_once_they_are_filled(mesh_of):
    state, step = stage(keep_from=1)
    compiled, now, filled = parallel.data_parallel(step, mesh_of(2)), state, []
    now = parallel.replicate(now, mesh_of(2))
    for k in range(5):
        now, metrics = compiled(now, parallel.shard(batch_of(k), mesh_of(2)))
        filled.append(round(float(metrics["queue_filled"]) * SIZE))
        others = 2 * BATCH - 1 + filled[-1]
        np.testing.assert_allclose(float(metrics["collapsed"]), np.log(others), rtol=1e-6)
    assert filled == [0, 0, 16, 32, 40]


@pytest.mark.slow
def test_gradient_cache_gives_the_same_with_a_queue(x64, mesh_of):
    """Without batch statistics, so that parts do not differ from the whole."""
    whole, parts = (
        run(mesh_of(2), *stage(normalizing=False, micro_batches=count), batch_of(0), count=3)[0]
        for count in (1, 4)
    )
    assert_close(parts.params, whole.params, 1e-7)
    assert_close(parts.aux, whole.aux, 1e-7)


def test_keys_have_no_gradient(x64, mesh_of):
    """The loss moves with the momentum encoder, but only the trained one is moved by it."""
    state, step = stage()
    moved = jax.tree.map(lambda x: x + 0.1, state.aux["momentum"])
    _, metrics = run(mesh_of(1), state, step, batch_of(0))
    far = state.replace(aux={**state.aux, "momentum": moved})
    second, others = run(mesh_of(1), far, step, batch_of(0))
    assert abs(float(metrics["loss"]) - float(others["loss"])) > 1e-3
    expected = optax.incremental_update(second.params, moved, 1 - DECAY)
    assert_close(second.aux["momentum"], expected, 1e-12)
