"""Schedules, optimizers and the parameter average: loops, the authors' printed values, PyTorch."""

import re
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from supcon_jax.models import Model, ResNet, make_head
from supcon_jax.optimizers import (
    EXCLUDE,
    OPTIMIZERS,
    SCHEDULES,
    make_optimizer,
    make_schedule,
    update_average,
)

# Steps per epoch of the authors' ImageNet and CIFAR-10 recipes are fractions.
IMAGENET, CIFAR = Fraction(1281167, 6144), Fraction(50000, 4096)
WARMUP = int(12 * IMAGENET)
FLOAT32_RATE = float(np.float32(0.97))  # whose 43rd power is printed
EVERY_HALF_EPOCH = dict(decay_rate=FLOAT32_RATE, decay_steps=float(IMAGENET / 2))
THREE_DROPS = dict(decay_rate=0.2, boundaries=tuple(int(e * CIFAR) for e in (60, 75, 90)))

# First step of the stage, its schedule, and "step: learning rate" as far as it was printed.
PUBLISHED = {
    "supcon": (
        0,
        make_schedule("cosine", 9.6, steps=WARMUP + int(338 * IMAGENET), warmup_steps=WARMUP),
        "0: 0, 1: 0.00383693, 1251: 4.8, 2502: 9.6, 10000: 9.334403, 37741: 4.800214, 72982: 0",
    ),
    "linear": (
        int(350 * IMAGENET),
        make_schedule(
            "exponential",
            1.2,
            steps=WARMUP + int(78 * IMAGENET),
            warmup_steps=WARMUP,
            **EVERY_HALF_EPOCH,
        ),
        "72984: 0.00047962, 74234: 0.6, 75485: 1.2, 75590: 1.164, 80000: 0.3238668, 91751: 0",
    ),
    "cifar": (
        int(1000 * CIFAR),
        make_schedule("step", 40.0, steps=int(100 * CIFAR), **THREE_DROPS),
        "12207: 40, 12939: 40, 12940: 8, 13123: 1.6, 13306: 0.32, 13428: 0",
    ),
}

SHAPES = {
    "encoder": {
        "conv_stem": {"kernel": (3, 3, 2, 4)},
        "norm_stem": {"scale": (4,), "bias": (4,)},
        "zero": {"kernel": (3, 4)},  # weights that start at zero
        "unused": {"kernel": (3, 4)},  # weights whose gradient is zero
    },
    "head": {"Dense_0": {"kernel": (3, 4), "bias": (4,)}, "BatchNorm_0": {"bias": (4,)}},
}
NORMS = ("encoder/norm_stem/scale", "encoder/norm_stem/bias", "head/BatchNorm_0/bias")
EXCLUDED = {"none": (), "norm": NORMS, "norm_and_bias": (*NORMS, "head/Dense_0/bias")}
COMBINATIONS = [(name, kind) for name, kinds in OPTIMIZERS.items() for kind in kinds]
RATES = [0.1, 0.3, 0.5, 0.4, 0.2, 0.05]  # one a step
MOMENTUM, DECAY, EPSILON, BETAS, TRUST, WEIGHT_DECAY = 0.8, 0.7, 0.01, (0.8, 0.95), 0.02, 0.3
CONSTANTS = dict(
    momentum=MOMENTUM,
    decay=DECAY,
    epsilon=EPSILON,
    betas=BETAS,
    trust_coefficient=TRUST,
    weight_decay=WEIGHT_DECAY,
)


def schedule(step):
    return jnp.asarray(RATES)[step]


def values(schedule, steps):
    """Learning rates of many steps, compiled."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32)))


def names(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return ["/".join(key.key for key in path) for path, _ in leaves]


def weights_and_gradients(dtype):
    """Parameters, and their gradients at all steps, `[6, ...]` a leaf."""
    rng = np.random.RandomState(0)

    def draw(*steps):
        return jax.tree.map(
            lambda shape: rng.normal(size=(*steps, *shape)).astype(dtype),
            SHAPES,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    params, grads = draw(), draw(len(RATES))
    params["encoder"]["zero"]["kernel"][:] = 0
    grads["encoder"]["unused"]["kernel"][:] = 0
    return params, grads


def run(tx, params, grads):
    """Parameters and state after all steps."""
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for i in range(len(jax.tree.leaves(grads)[0])):
        updates, state = tx.update(jax.tree.map(lambda g, i=i: g[i], grads), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def run_compiled(tx, params, grads):
    """The same in one program; `scan` refuses a state that changes type."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[0])((params, tx.init(params)))


def loop(name, kind, excluded, w, grads):
    """One parameter after all steps, by the formulas as they are printed."""
    v, m, s = np.zeros_like(w), np.zeros_like(w), np.ones_like(w) * (name == "rmsprop")
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), start=1):
        before, wd = w, 0.0 if excluded else WEIGHT_DECAY
        if kind != "decoupled":
            g = g + wd * w
        if name == "sgd":
            v = MOMENTUM * v + g
            w = w - rate * v
        elif name == "nesterov":
            v = MOMENTUM * v + g
            w = w - rate * (g + MOMENTUM * v)
        elif name == "lars":
            length, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
            trust = TRUST * length / slope if length > 0 and slope > 0 and not excluded else 1.0
            v = MOMENTUM * v + rate * trust * g
            w = w - v
        elif name == "rmsprop":
            s = DECAY * s + (1 - DECAY) * g**2
            v = MOMENTUM * v + rate * g / np.sqrt(s + EPSILON)
            w = w - v
        elif name == "adamw":
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            s = BETAS[1] * s + (1 - BETAS[1]) * g**2
            corrected = m / (1 - BETAS[0] ** t), s / (1 - BETAS[1] ** t)
            w = w - rate * corrected[0] / (np.sqrt(corrected[1]) + EPSILON)
        if kind == "decoupled":
            w = w - rate * wd * before
    return w


def looped(name, kind, exclude, params, grads):
    treedef = jax.tree.structure(params)
    leaves = zip(names(params), jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    excluded = EXCLUDED[exclude]
    return treedef.unflatten([loop(name, kind, path in excluded, w, g) for path, w, g in leaves])


def assert_close(found, expected, rtol, atol=0.0):
    for path, a, b in zip(
        names(expected), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


# ---- schedules


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_learning_rates_of_the_authors_to_the_last_printed_digit(recipe, x64):
    start, schedule, table = PUBLISHED[recipe]
    for entry in table.split(", "):
        step, printed = entry.split(": ")
        decimals = len(printed.partition(".")[2]) or 12
        # A float, as optax divides int32 in float32.
        found = float(schedule(float(int(step) - start)))
        assert abs(found - float(printed)) <= 0.5 * 0.1**decimals, entry


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_learning_rates_of_the_authors_in_float32(recipe):
    """Within 1e-6 of the peak: optax's warm-up subtracts from it."""
    start, schedule, table = PUBLISHED[recipe]
    entries = [entry.split(": ") for entry in table.split(", ")]
    found = values(schedule, [int(step) - start for step, _ in entries])
    expected = np.array([float(printed) for _, printed in entries])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * expected.max())


@pytest.mark.parametrize(
    ("peak", "steps", "warmup_steps", "final_ratio"),
    [(0.5, 990, 99, 0.0), (3.0, 550, 11, 0.0), (0.5, 400, 0, 0.0), (0.8, 480, 10, 1e-3)],
)
def test_cosine_is_optax_to_the_bit(peak, steps, warmup_steps, final_ratio):
    ours = make_schedule(
        "cosine", peak, steps=steps, warmup_steps=warmup_steps, final_ratio=final_ratio
    )
    theirs = optax.warmup_cosine_decay_schedule(
        init_value=peak if warmup_steps == 0 else 0.0,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=final_ratio * peak,
    )
    np.testing.assert_array_equal(values(ours, range(steps + 1)), values(theirs, range(steps + 1)))


def test_exponential_drops_at_exact_steps_under_jit():
    """Also at lengths where floor(t / length), compiled, is a step late (141, 218)."""
    for length in (1, 3, 104, 141, 218):
        schedule = make_schedule("exponential", 1.0, steps=900, decay_rate=0.5, decay_steps=length)
        steps = np.arange(900)
        np.testing.assert_array_equal(values(schedule, steps), np.float32(0.5 ** (steps // length)))


def test_exponential_with_a_fraction_of_a_step_does_not_drift():
    steps = range(int(78 * IMAGENET))
    found = values(make_schedule("exponential", 1.2, steps=len(steps), **EVERY_HALF_EPOCH), steps)
    drops = np.array([int(step / (IMAGENET / 2)) for step in steps])
    assert drops.max() == 155
    np.testing.assert_allclose(found, 1.2 * FLOAT32_RATE**drops, rtol=1e-7)
    rounded = make_schedule("exponential", 1.0, steps=30, decay_rate=0.5, decay_steps=0.14 * 100)
    np.testing.assert_array_equal(values(rounded, [13, 14, 27, 28]), [1.0, 0.5, 0.5, 0.25])


def test_warmup_starts_where_it_is_told_in_all_schedules():
    """The authors' PyTorch recipe: 0.01 to 0.5 in 10 epochs of 48 steps."""
    for name in SCHEDULES:
        schedule = make_schedule(name, 0.5, steps=4800, warmup_steps=480, warmup_start=0.01)
        steps = np.arange(481)
        expected = 0.01 + steps / 480 * 0.49
        np.testing.assert_allclose(values(schedule, steps), expected, rtol=1e-5)


def test_boundaries_are_counted_from_the_end_of_the_warmup():
    schedule = make_schedule(
        "step", 1.0, steps=40, warmup_steps=10, decay_rate=0.1, boundaries=(0, 20)
    )
    steps = [9, 10, 11, 30, 31, 40, 41]
    np.testing.assert_allclose(
        values(schedule, steps), [0.9, 1.0, 0.1, 0.1, 0.01, 0.01, 0.0], rtol=1e-6
    )


def test_constant_and_what_comes_after_the_stage():
    options = dict(decay_rate=0.5, decay_steps=2, boundaries=(1, 2), final_ratio=0.5)
    schedule = make_schedule("constant", 0.3, steps=8, **options)
    np.testing.assert_array_equal(values(schedule, range(9)), np.full(9, np.float32(0.3)))
    for name in SCHEDULES:
        schedule = make_schedule(name, 0.3, steps=8, **options)
        assert values(schedule, [8])[0] > 0
        assert values(schedule, [9, 10**6]).max() == 0


def test_cosine_ends_at_its_final_ratio():
    schedule = make_schedule("cosine", 0.5, steps=480, warmup_steps=10, final_ratio=1e-3)
    np.testing.assert_allclose(values(schedule, [480]), 5e-4, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(name="cosin"),
            "schedule must be one of cosine, exponential, step, constant; got 'cosin'",
        ),
        (dict(warmup_steps=10), "warm-up must be shorter than the stage: 10 of 10 steps"),
        (dict(learning_rate=-0.1), "learning_rate must be 0 or more; got -0.1"),
        (dict(learning_rate=float("nan")), "learning_rate must be 0 or more; got nan"),
        (dict(warmup_start=2.0), "warmup_start must be from 0 to the peak 1.0; got 2.0"),
        (dict(final_ratio=1.5), "final_ratio must be from 0 to 1; got 1.5"),
        (dict(decay_rate=0.0), "decay_rate must be above 0 and at most 1; got 0.0"),
        (dict(decay_rate=1.1), "decay_rate must be above 0 and at most 1; got 1.1"),
        (dict(decay_steps=0), "decay_steps must be 1 or more; got 0"),
        (dict(boundaries=(3, 3)), "boundaries must be increasing steps, 0 or more; got (3, 3)"),
        (dict(boundaries=(-1, 3)), "boundaries must be increasing steps, 0 or more; got (-1, 3)"),
    ],
)
def test_schedules_refuse(changed, message):
    arguments = dict(name="step", learning_rate=1.0, steps=10) | changed
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_schedule(**arguments)


# ---- optimizers


@pytest.mark.parametrize("exclude", EXCLUDE)
@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_updates_are_the_printed_formulas(name, kind, exclude, x64):
    params, grads = weights_and_gradients(np.float64)
    tx = make_optimizer(name, schedule, weight_decay_kind=kind, exclude=exclude, **CONSTANTS)
    found, _ = run(tx, params, grads)
    assert_close(found, looped(name, kind, exclude, params, grads), rtol=1e-11)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_clipped_gradients_have_at_most_that_norm_before_all_else(name, kind, x64):
    params, grads = weights_and_gradients(np.float64)
    squares = sum((g.reshape(len(RATES), -1) ** 2).sum(1) for g in jax.tree.leaves(grads))
    clip_norm = float(np.median(np.sqrt(squares)))  # some steps are clipped, some are not
    factor = np.minimum(1, clip_norm / np.sqrt(squares))
    assert (factor < 1).any() and (factor == 1).any()
    shorter = jax.tree.map(lambda g: g * factor.reshape(-1, *[1] * (g.ndim - 1)), grads)
    options = dict(weight_decay_kind=kind, clip_norm=clip_norm, **CONSTANTS)
    found, _ = run(make_optimizer(name, schedule, **options), params, grads)
    expected = looped(name, kind, "norm_and_bias", params, shorter)
    assert_close(found, expected, rtol=1e-11)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_updates_in_float32_and_a_state_that_can_be_saved(name, kind):
    params, grads = weights_and_gradients(np.float32)
    tx = make_optimizer(name, schedule, weight_decay_kind=kind, exclude="norm", **CONSTANTS)
    found, state = run_compiled(tx, params, grads)
    assert_close(found, looped(name, kind, "norm", params, grads), rtol=1e-5, atol=1e-6)
    first = jax.tree.leaves(tx.init(params))
    assert all(isinstance(leaf, jax.Array) for leaf in first)
    assert {leaf.dtype.name for leaf in first} <= {"float32", "int32"}
    half = jax.tree.map(lambda g: jnp.asarray(g[0], jnp.bfloat16), grads)
    updates, _ = jax.eval_shape(tx.update, half, state, found)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_stopped_and_resumed_is_the_same_to_the_bit(name, kind):
    params, grads = weights_and_gradients(np.float32)
    tx = make_optimizer(name, schedule, weight_decay_kind=kind, **CONSTANTS)
    update = jax.jit(tx.update)

    def steps(params, state, which):
        for i in which:
            updates, state = update(jax.tree.map(lambda g, i=i: g[i], grads), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole, _ = steps(params, tx.init(params), range(4))
    saved = jax.tree.map(np.asarray, steps(params, tx.init(params), range(2)))
    resumed, _ = steps(*jax.tree.map(jnp.asarray, saved), range(2, 4))
    assert_close(resumed, whole, rtol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("weights", "slope"), [((1.0, 2.0), 0.1), ((3.0, 4.0), 0.01)])
def test_one_step_of_lars_as_in_the_authors_tests(weights, slope, dtype, x64):
    tx = make_optimizer("lars", optax.constant_schedule(3.0), weight_decay_kind="lars")
    params = {"kernel": np.array(weights, dtype)}
    found, _ = run(tx, params, {"kernel": np.full((1, 2), slope, dtype)})
    expected = np.array(weights) - 3 * 0.001 * np.linalg.norm(weights) / np.sqrt(2)
    assert found["kernel"].dtype == dtype
    rtol = {np.float16: 1e-3, np.float32: 1e-6, np.float64: 1e-14}[dtype]
    np.testing.assert_allclose(found["kernel"], expected, rtol=rtol)


def test_lars_is_plain_momentum_at_a_zero_norm():
    """Zero weights or a zero gradient: trust 1, and no NaN."""
    tx = make_optimizer("lars", optax.constant_schedule(0.5), weight_decay_kind="lars")
    params = {"a": {"kernel": np.zeros(3, np.float32)}, "b": {"kernel": np.ones(3, np.float32)}}
    grads = {"a": {"kernel": np.ones((1, 3))}, "b": {"kernel": np.zeros((1, 3))}}
    grads = jax.tree.map(np.float32, grads)
    found, _ = run(tx, params, grads)
    np.testing.assert_array_equal(found["a"]["kernel"], np.full(3, -0.5))
    np.testing.assert_array_equal(found["b"]["kernel"], np.ones(3))


def test_sgd_of_the_recorded_runs_to_the_bit():
    """L2 on the kernels, then optax.sgd: what the runs in experiments/ were made with."""
    params, grads = weights_and_gradients(np.float32)
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    recorded = optax.chain(
        optax.add_decayed_weights(5e-4, kernels), optax.sgd(schedule, momentum=0.9)
    )
    ours = make_optimizer("sgd", schedule, weight_decay=5e-4)
    assert_close(run(ours, params, grads)[0], run(recorded, params, grads)[0], rtol=0)


def torch_run(name, weights, grads, **options):
    """A parameter after all steps of `torch.optim` at the constant rate 0.2."""
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.tensor(weights))
    optimizer = getattr(torch.optim, name)([w], 0.2, weight_decay=0.1, **options)
    if name == "RMSprop":  # it starts from zero, the authors' code from one
        zero, one = torch.zeros_like(w), torch.ones_like(w)
        optimizer.state[w] = dict(step=torch.tensor(0.0), square_avg=one, momentum_buffer=zero)
    for g in grads:
        w.grad = torch.tensor(g)
        optimizer.step()
    return w.detach().numpy()


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "options"),
    [
        ("sgd", {}, "SGD", dict(momentum=0.9)),
        ("nesterov", {}, "SGD", dict(momentum=0.9, nesterov=True)),
        ("adamw", dict(weight_decay_kind="decoupled", epsilon=1e-8), "AdamW", {}),
        # Its epsilon is outside of the root and its learning rate outside of the momentum.
        ("rmsprop", dict(epsilon=0.0), "RMSprop", dict(momentum=0.9, alpha=0.9, eps=0.0)),
    ],
)
def test_pytorch_agrees_where_it_has_the_same_rule(name, ours, theirs, options, x64):
    weights, grads = (x["head"]["Dense_0"]["kernel"] for x in weights_and_gradients(np.float64))
    tx = make_optimizer(name, optax.constant_schedule(0.2), weight_decay=0.1, **ours)
    found, _ = run(tx, {"kernel": weights}, {"kernel": grads})
    expected = torch_run(theirs, weights, grads, **options)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-11)


def test_adamw_is_optax():
    params, grads = weights_and_gradients(np.float32)
    ours = make_optimizer(
        "adamw",
        schedule,
        epsilon=1e-8,
        weight_decay=0.05,
        weight_decay_kind="decoupled",
        exclude="none",
    )
    theirs = optax.adamw(schedule, weight_decay=0.05)
    assert_close(run(ours, params, grads)[0], run(theirs, params, grads)[0], rtol=1e-5, atol=1e-6)


# ---- exclusions


def left_out(params, exclude):
    """Names of the parameters that weight decay alone does not move."""
    tx = make_optimizer(
        "sgd", optax.constant_schedule(1.0), weight_decay=0.5, exclude=exclude, momentum=0.0
    )
    ones = jax.tree.map(lambda leaf: jnp.ones(1), params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    moved = zip(names(params), jax.tree.leaves(updates), strict=True)
    return {name for name, update in moved if update[0] == 0}


def test_exclusions_of_a_resnet():
    """A module with running statistics is a batch norm."""
    head = make_head("projection", classes=10, layers=(16, 8), batch_norm=True)
    model = Model(ResNet(depth=10, width=0.125, stem="cifar"), head)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    params = variables["params"]
    norms = {name.rpartition("/")[0] for name in names(variables["batch_stats"])}
    everything = set(names(params))
    assert left_out(params, "none") == set()
    of_norms = {name for name in everything if name.rpartition("/")[0] in norms}
    assert left_out(params, "norm") == of_norms
    assert len(of_norms) == 2 * len(norms) == 28
    kernels = {name for name in everything if name.endswith("/kernel")}
    assert left_out(params, "norm_and_bias") == everything - kernels
    assert left_out(params, ("^head/", "conv_stem")) == {
        name for name in everything if name.startswith("head/") or "conv_stem" in name
    }


def test_exclusions_of_a_transformer():
    params = {
        "encoder": {
            "block0": {
                "LayerNorm_0": {"scale": 0, "bias": 0},
                "Dense_0": {"kernel": 0, "bias": 0},
            },
            "norm": {"scale": 0, "bias": 0},
            "position": 0,
        },
        "head": {"Dense_0": {"kernel": 0, "bias": 0}},
    }
    norms = {
        f"encoder/{module}/{leaf}"
        for module in ("block0/LayerNorm_0", "norm")
        for leaf in ("scale", "bias")
    }
    assert left_out(params, "norm") == norms
    rest = {"encoder/block0/Dense_0/bias", "encoder/position", "head/Dense_0/bias"}
    assert left_out(params, "norm_and_bias") == norms | rest


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(name="lamb"),
            "optimizer must be one of sgd, nesterov, lars, rmsprop, adamw; got 'lamb'",
        ),
        (
            dict(weight_decay_kind="lars"),
            "weight_decay_kind of sgd must be l2 or decoupled; got 'lars'",
        ),
        (dict(name="lars"), "weight_decay_kind of lars must be lars; got 'l2'"),
        (dict(name="adamw"), "weight_decay_kind of adamw must be decoupled; got 'l2'"),
        (dict(exclude="bn"), "exclude must be one of none, norm, norm_and_bias; got 'bn'"),
        (dict(momentum=1.0), "momentum must be from 0 to below 1; got 1.0"),
        (dict(decay=-0.1), "decay must be from 0 to below 1; got -0.1"),
        (dict(betas=(0.9, 1.0)), "betas must be from 0 to below 1; got 1.0"),
        (dict(betas=(-0.9, 0.9)), "betas must be from 0 to below 1; got -0.9"),
        (dict(epsilon=-1e-3), "epsilon must be 0 or more; got -0.001"),
        (dict(weight_decay=-1e-4), "weight_decay must be 0 or more; got -0.0001"),
        (dict(clip_norm=-1.0), "clip_norm must be 0 or more; got -1.0"),
        (dict(trust_coefficient=0.0), "trust_coefficient must be positive; got 0.0"),
    ],
)
def test_optimizers_refuse(changed, message):
    arguments = dict(name="sgd", schedule=optax.constant_schedule(0.1)) | changed
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_optimizer(**arguments)


# ---- average


@pytest.mark.parametrize("decay", [0.2, 0.9])  # whole from the third step on; never
def test_parameter_average_is_the_weighted_sum_of_all_parameters(decay):
    _, history = weights_and_gradients(np.float32)  # six trees of parameters, one after the other
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), history)
    average, update = first, jax.jit(partial(update_average, decay=decay))
    factors = np.eye(6)[0]
    for i, warmed in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14], start=1):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], history)
        average = update(average, params, step=jnp.int32(i - 1))
        kept = min(decay, warmed)
        factors = kept * factors + (1 - kept) * np.eye(6)[i]
    expected = jax.tree.map(lambda leaf: np.tensordot(factors, leaf.astype(float), 1), history)
    assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(average)} == {"float32"}
    assert_close(update_average(first, average, 0.0, step=100), average, rtol=0)
