"""Encoders and heads: sizes, a forward pass in plain NumPy, batch norm, precision, freezing."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from supcon_jax import config as configuration
from supcon_jax import stages
from supcon_jax.models import (
    DEPTHS,
    ENCODERS,
    Classifier,
    Model,
    Projection,
    ResNet,
    ViT,
    make_encoder,
    make_head,
)
from supcon_jax.validation import validate

KEY = jax.random.key(0)
PHOTO = load_sample_image("flower.jpg")[0:400:4, 100:500:4].astype(np.float32) / 127.5 - 1

# Depth -> trainable parameters with the ImageNet and the CIFAR stem, of the authors' encoders
# (https://github.com/google-research/google-research/tree/master/supcon): with a projection
# shortcut in the first group of the 18- and 34-layer networks too, which torchvision has not.
# They have no depth 10: depth 18 without its second blocks of 18 c^2 + 4 c each, c = 64 to 512.
PARAMETERS = {
    10: (4_910_016, 4_902_336),
    18: (11_180_736, 11_173_056),
    34: (21_288_896, 21_281_216),
    50: (23_508_032, 23_500_352),
    101: (42_500_160, 42_492_480),
    152: (58_143_808, 58_136_128),
    200: (62_624_832, 62_617_152),
}

# Published counts with a classifier of 1,000 classes (torchvision's documentation), and those of
# the authors' ResNeXt without one: 64 groups of 2.
VARIANTS = [
    (50, dict(groups=32, group_width=4), 25_028_904),
    (101, dict(groups=32, group_width=8), 88_791_336),
    (101, dict(groups=64, group_width=4), 83_455_272),
    (50, dict(group_width=128), 68_883_240),
    (50, dict(first_shortcut="identity"), 25_557_032),
    (18, dict(first_shortcut="identity"), 11_689_512),
    (34, dict(first_shortcut="identity"), 21_797_672),
    (50, dict(groups=64, group_width=2), 22_272_576 + 2_049_000),
    (101, dict(groups=64, group_width=2), 40_794_688 + 2_049_000),
]


def photographs(count, side):
    """`[count, side, side, 3]`: parts of a photograph."""
    return np.stack([PHOTO[3 * i : 3 * i + side, i : i + side] for i in range(count)])


def shapes_of(model, side=32):
    return jax.eval_shape(partial(model.init, train=False), KEY, jnp.zeros((1, side, side, 3)))


def size_of(tree):
    return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(tree))


def randomized(shapes, seed=0):
    """Random values for all parameters and statistics, of a size that keeps the features so."""
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return random.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape)
        return random.normal(0, 0.3, leaf.shape)

    return jax.tree_util.tree_map_with_path(lambda *x: jnp.asarray(draw(*x), jnp.float32), shapes)


@pytest.fixture(autouse=True)
def small_depths(monkeypatch):
    """Networks of two or five blocks, quick to compile, basic (1, 3) and bottleneck (2, 4)."""
    monkeypatch.setitem(DEPTHS, 1, ((2,), False))
    monkeypatch.setitem(DEPTHS, 2, ((2,), True))
    monkeypatch.setitem(DEPTHS, 3, ((2, 1, 1, 1), False))
    monkeypatch.setitem(DEPTHS, 4, ((2, 1, 1, 1), True))


small = partial(ResNet, 1, width=0.125, stem="cifar")


# Sizes.


@pytest.mark.parametrize("depth", PARAMETERS)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_parameter_counts(depth, stem):
    shapes = shapes_of(ResNet(depth, stem=stem))
    assert size_of(shapes["params"]) == PARAMETERS[depth][stem == "cifar"]
    scales = [
        x
        for path, x in jax.tree.leaves_with_path(shapes["params"])
        if "norm" in str(path) or "BatchNorm" in str(path)
    ]
    assert size_of(shapes["batch_stats"]) == size_of(scales)


@pytest.mark.parametrize(("depth", "options", "expected"), VARIANTS)
def test_parameter_counts_of_variants(depth, options, expected):
    classifier = 1000 * ((2048 if depth >= 50 else 512) + 1)
    params = shapes_of(ResNet(depth, **options))["params"]
    assert size_of(params) + classifier == expected


def output_of(model, side, **options):
    apply = partial(model.apply, train=False, **options)
    return jax.eval_shape(apply, shapes_of(model, side), jnp.zeros((2, side, side, 3)))


@pytest.mark.parametrize(
    ("depth", "width", "features"),
    [(18, 1.0, 512), (50, 1.0, 2048), (18, 0.3, 153)],
)
def test_number_of_features(depth, width, features):
    out = output_of(ResNet(depth, width=width, stem="cifar"), 32)
    assert out.shape == (2, features) and out.dtype == jnp.float32


@pytest.mark.parametrize("width", [0.125, 0.3, 2.0])
def test_width_multiplies_all_filters(width):
    params = shapes_of(ResNet(18, width=width))["params"]
    assert params["conv_stem"]["kernel"].shape == (7, 7, 3, int(64 * width))
    for group in range(4):
        block = params[f"group{group}_block0"]
        assert block["Conv_0"]["kernel"].shape[-1] == int(64 * 2**group * width)
        assert block["conv_shortcut"]["kernel"].shape[-1] == int(64 * 2**group * width)


@pytest.mark.parametrize(
    ("stem", "side", "sides", "stride"),
    [("imagenet", 64, (16, 8, 4, 2), 32), ("cifar", 32, (32, 16, 8, 4), 8)],
)
def test_strides(stem, side, sides, stride):
    model = ResNet(4, width=0.0625, stem=stem)
    assert model.stride == stride == side // sides[-1]
    _, inner = output_of(model, side, capture_intermediates=True, mutable=["intermediates"])
    inner = inner["intermediates"]
    for group, expected in enumerate(sides):
        assert inner[f"group{group}_block0"]["__call__"][0].shape[1:3] == (expected, expected)
    strided = inner["group1_block0"]
    assert strided["Conv_0"]["__call__"][0].shape[1] == sides[0]  # the 1x1 before
    assert strided["Conv_1"]["__call__"][0].shape[1] == sides[1]  # the 3x3: version 1.5


# What it refuses.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=20), "depth must be one of 10, 18, 34, 50, 101, 152, 200, 1, 2, 3, 4; got 20"),
        (dict(depth=18, stem="none"), "stem must be one of cifar, imagenet; got 'none'"),
        (
            dict(depth=18, first_shortcut="none"),
            "first_shortcut must be one of projection, identity; got 'none'",
        ),
        (
            dict(depth=18, groups=32, group_width=4),
            "groups=32 and group_width=4 need bottlenecks, which depths 50, 101, 152, 200, 2, 4 "
            "have; got depth 18",
        ),
        (
            dict(depth=50, width=0.26, groups=32, group_width=4),
            "width=0.26 and group_width=4 make groups of 33 * 4 / 64 = 2.0625 filters; choose "
            "them so that this is a whole number",
        ),
        (
            dict(depth=50, groups=0),
            "width must be at least 1/64, groups and group_width at least 1; got 1.0, 0 and 64",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ResNet(**options)


# A forward pass in NumPy.


def conv(x, kernel, stride):
    groups = x.shape[-1] // kernel.shape[2]
    if groups > 1:
        parts = zip(np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True)
        return np.concatenate([conv(*part, stride) for part in parts], -1)
    pad = (len(kernel) - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = ((side - len(kernel)) // stride + 1 for side in x.shape[1:3])
    total = 0
    for row in range(len(kernel)):
        for column in range(len(kernel)):
            rows = slice(row, row + stride * height, stride)
            columns = slice(column, column + stride * width, stride)
            total = total + x[:, rows, columns][:, :height, :width] @ kernel[row, column]
    return total


def norm(x, params, statistics):
    normal = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    return normal * params["scale"] + params["bias"]


def block(x, params, statistics, stride, shortcut_only):
    count = sum(name.startswith("Conv_") for name in params)
    strides = {2: (stride, 1), 3: (1, stride, 1)}[count]
    residual = x
    for i in range(count):
        residual = conv(residual, params[f"Conv_{i}"]["kernel"], strides[i])
        residual = norm(residual, params[f"BatchNorm_{i}"], statistics[f"BatchNorm_{i}"])
        residual = np.maximum(residual, 0) if i < count - 1 else residual
    if "conv_shortcut" in params:
        x = conv(x, params["conv_shortcut"]["kernel"], stride)
        x = norm(x, params["norm_shortcut"], statistics["norm_shortcut"])
    return np.maximum(x if shortcut_only else x + residual, 0)


def features_of(x, variables, stem, shortcut_only=False):
    variables = jax.tree.map(partial(np.asarray, dtype=np.float64), variables)
    params, statistics = variables["params"], variables["batch_stats"]
    x = conv(np.float64(x), params["conv_stem"]["kernel"], 2 if stem == "imagenet" else 1)
    x = np.maximum(norm(x, params["norm_stem"], statistics["norm_stem"]), 0)
    if stem == "imagenet":
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # with zeros: all values are positive
        views = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = views[:, ::2, ::2].max((-2, -1))
    for name in sorted(name for name in params if name.startswith("group")):
        stride = 2 if name.endswith("block0") and not name.startswith("group0") else 1
        x = block(x, params[name], statistics[name], stride, shortcut_only)
    return x.mean((1, 2))


@pytest.mark.parametrize(
    ("depth", "stem", "side", "options"),
    [
        (3, "imagenet", 64, {}),
        (3, "cifar", 15, {}),
        (3, "cifar", 15, dict(first_shortcut="identity")),
        (4, "imagenet", 64, {}),
        (4, "cifar", 15, {}),
        (4, "cifar", 15, dict(groups=4, group_width=24)),
    ],
)
def test_forward_pass_equals_numpy(depth, stem, side, options):
    model = ResNet(depth, width=0.125, stem=stem, **options)
    variables = randomized(shapes_of(model, side))
    images = photographs(2, side)
    actual = jax.jit(partial(model.apply, train=False))(variables, images)
    expected = features_of(images, variables, stem)
    assert expected.std() > 0.05
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "zero"), [(1, True), (1, False), (2, True)])
def test_zero_init_residual_starts_each_block_as_its_shortcut(depth, zero):
    images = photographs(2, 16)
    model = ResNet(depth, width=0.5, stem="cifar", zero_init_residual=zero)
    quick = jax.random.key(0, impl="unsafe_rbg")  # to compile
    variables = jax.jit(partial(model.init, train=False))(quick, images)
    whole = features_of(images, variables, "cifar")
    shortcuts = features_of(images, variables, "cifar", shortcut_only=True)
    assert shortcuts.std() > 0.01
    assert np.array_equal(whole, shortcuts) == zero
    check_initial_values(variables)


def check_initial_values(variables):
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = path[-1].key
        if name == "kernel":  # LeCun: variance 1 / fan-in
            assert abs(leaf.std() * np.sqrt(np.prod(leaf.shape[:-1])) - 1) < 0.1
        elif name in ("bias", "mean"):
            assert not leaf.any()
        elif name == "var":
            assert (leaf == 1).all()


# Training and inference.


@pytest.fixture(scope="module")
def trained():
    """A step of training mode: variables, images, outputs and the statistics after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEPTHS, 1, ((2,), False))
        variables = randomized(shapes_of(small(), 16))
        images = photographs(8, 16)
        apply = jax.jit(partial(small().apply, train=True, mutable=["batch_stats"]))
        outputs, updated = apply(variables, images)
        return variables, images, outputs, updated["batch_stats"]


def test_training_moves_the_statistics_a_tenth_of_the_way(trained):
    variables, images, _, after = trained
    seen = conv(np.float64(images), np.asarray(variables["params"]["conv_stem"]["kernel"]), 1)
    before = variables["batch_stats"]["norm_stem"]
    for name, value in (("mean", seen.mean((0, 1, 2))), ("var", seen.var((0, 1, 2)))):
        expected = 0.9 * np.asarray(before[name]) + 0.1 * value
        np.testing.assert_allclose(after["norm_stem"][name], expected, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["batch_stats"], after)
    assert all(jax.tree.leaves(moved))


def test_training_normalizes_by_the_batch(trained):
    variables, images, outputs, _ = trained
    apply = jax.jit(partial(small().apply, train=False, mutable=["batch_stats"]))
    inferred, after = apply(variables, images)
    assert np.abs(outputs - inferred).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"])


def test_inference_of_an_image_does_not_depend_on_the_others(trained):
    variables, images, _, _ = trained
    apply = jax.jit(partial(small().apply, train=False))
    others = np.concatenate([images[:3], -images[3:]])
    together, apart = apply(variables, images), apply(variables, others)
    np.testing.assert_allclose(apart[:3], together[:3], rtol=1e-5, atol=1e-6)
    assert np.abs(apart[3:] - together[3:]).max() > 0.01


def test_model_gives_features_and_the_output_of_its_head():
    images = photographs(8, 16)
    for normalize in (False, True):
        model = Model(small(), Classifier(7), normalize=normalize)
        both = randomized(shapes_of(model, 16), seed=1)
        features, outputs = jax.jit(partial(model.apply, train=False))(both, images)
        encoder = {kind: tree["encoder"] for kind, tree in both.items()}
        np.testing.assert_allclose(
            features, features_of(images, encoder, "cifar"), rtol=1e-4, atol=1e-4
        )
        inputs = np.float64(features)
        if normalize:
            inputs = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
        head = both["params"]["head"]["Dense_0"]
        expected = inputs @ np.float64(head["kernel"]) + np.float64(head["bias"])
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "head")])
def test_frozen_parts_stay_in_inference_mode(frozen):
    model = Model(small(), Projection((8, 4), batch_norm=True), frozen=frozen)
    variables, images = randomized(shapes_of(model, 16)), photographs(8, 16)
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    (features, _), updated = apply(variables, images)
    for part in ("encoder", "head"):
        same = jax.tree.map(
            np.array_equal, variables["batch_stats"][part], updated["batch_stats"][part]
        )
        assert set(jax.tree.leaves(same)) == {part in frozen}
    encoder = {kind: tree["encoder"] for kind, tree in variables.items()}
    inferred = features_of(images, encoder, "cifar")
    assert np.allclose(features, inferred, atol=1e-3) == ("encoder" in frozen)


@pytest.mark.parametrize("kept", [0.9, 0.98])
def test_running_statistics_keep_their_share(kept):
    def statistics(share):
        head = Projection((8, 4), batch_norm=True, batch_norm_momentum=share)
        model = Model(small(batch_norm_momentum=share), head)
        variables = randomized(shapes_of(model, 16))
        apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
        return variables["batch_stats"], apply(variables, photographs(8, 16))[1]["batch_stats"]

    (before, seen), (_, after) = statistics(0.0), statistics(kept)
    expected = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, before, seen)
    assert len(jax.tree.leaves(expected["head"])) == 2
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after, expected)


# Memory.


def gradients_of(model, variables, images):
    """Loss, gradients and statistics of a training step."""

    def loss(params):
        apply = partial(model.apply, train=True, mutable=["batch_stats"])
        features, updated = apply({**variables, "params": params}, images)
        return jnp.sum(features**2), updated["batch_stats"]

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def in_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.usefixtures("x64")
def test_remat_has_the_same_gradients_and_statistics():
    plain = ResNet(2, width=0.125, stem="cifar")
    remat = ResNet(2, width=0.125, stem="cifar", remat=True)
    assert shapes_of(plain, 16) == shapes_of(remat, 16)
    variables, images = in_float64((randomized(shapes_of(plain, 16)), photographs(4, 16)))
    expected, actual = (
        jax.jit(partial(gradients_of, model))(variables, images) for model in (plain, remat)
    )
    assert expected[0][0] > 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), actual, expected)


@pytest.mark.usefixtures("x64")
def test_remat_with_statistics_of_all_devices(mesh_of):
    model = small(remat=True, axis_name="data")
    variables, images = in_float64((randomized(shapes_of(small(), 16)), photographs(4, 16)))

    def step(variables, images):
        # The gradients of parameters that all devices have are sums over the devices already.
        (loss, statistics), gradients = gradients_of(model, variables, images)
        return (jax.lax.psum(loss, "data"), statistics), gradients

    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        step, mesh=mesh_of(2), in_specs=(spec(), spec("data")), out_specs=spec()
    )
    actual = jax.jit(sharded)(variables, images)
    expected = jax.jit(partial(gradients_of, small()))(variables, images)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), actual, expected)


def test_remat_keeps_less():
    def kept(model):
        """Bytes that the backward pass reads, parameters included."""
        variables = shapes_of(model, 16)

        def backward(variables):
            def apply(params):
                every = {**variables, "params": params}
                return model.apply(every, images, train=True, mutable=["batch_stats"])[0]

            return jax.vjp(apply, variables["params"])[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, variables))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    images = jnp.zeros((32, 16, 16, 3))
    assert kept(small(remat=True)) < kept(small()) / 2


# Precision.


@pytest.mark.parametrize("head", ["projection", "classifier"])
def test_bfloat16_computes_so_with_float32_parameters_and_outputs(head):
    images, results = photographs(4, 16), {}
    for dtype in (None, jnp.bfloat16):
        made = make_head(head, classes=5, layers=(8, 4), batch_norm=True, dtype=dtype)
        model = Model(small(dtype=dtype), made)
        shapes = shapes_of(model, 16)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
        apply = partial(model.apply, train=True, mutable=["batch_stats"])
        (_, results[dtype]), updated = jax.jit(apply)(randomized(shapes), images)
        assert results[dtype].dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(jnp.float32)}
    difference = np.abs(results[None] - results[jnp.bfloat16]).max()
    assert 1e-4 < difference < 0.2 * np.abs(results[None]).max()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_layer_computes_in_the_type(dtype):
    model = Model(small(dtype=dtype), Projection((8, 4), batch_norm=True, dtype=dtype))
    _, inner = output_of(model, 16, capture_intermediates=True, mutable=["intermediates"])
    kinds = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(inner["intermediates"])
    }
    layers = {
        name: kind
        for name, kind in kinds.items()
        if "Conv" in name or "Dense" in name or "Norm" in name or "conv" in name or "norm" in name
    }
    assert len(layers) == 15
    assert set(layers.values()) == {jnp.dtype(dtype or jnp.float32)}


# Heads.


def photo_features(count=6, dim=16):
    return jnp.asarray(PHOTO.reshape(-1, dim)[: 50 * count : 50])


@pytest.mark.parametrize("layers", [(128,), (32, 8), (32, 16, 8)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_projection_equals_numpy(layers, batch_norm):
    head, x = Projection(layers, batch_norm), photo_features()
    variables = randomized(jax.eval_shape(partial(head.init, train=False), KEY, x))
    actual = head.apply(variables, x, train=False)
    expected = np.float64(x)
    for i in range(len(layers)):
        params = variables["params"][f"Dense_{i}"]
        last = i == len(layers) - 1
        assert ("bias" in params) == (not last and not batch_norm)
        expected = expected @ np.float64(params["kernel"])
        if not last:
            if batch_norm:
                name = f"BatchNorm_{i}"
                parts = variables["params"][name], variables["batch_stats"][name]
                expected = norm(expected, *jax.tree.map(np.float64, parts))
            else:
                expected = expected + np.float64(params["bias"])
            expected = np.maximum(expected, 0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)
    assert len(variables["params"]) == (2 * len(layers) - 1 if batch_norm else len(layers))


def test_projection_normalizes_its_hidden_layers_by_the_batch_in_training():
    head, x = Projection((32, 8), batch_norm=True), photo_features()
    variables = randomized(jax.eval_shape(partial(head.init, train=False), KEY, x))
    training, updated = head.apply(variables, x, train=True, mutable=["batch_stats"])
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]
    seen = (x @ variables["params"]["Dense_0"]["kernel"]).mean(0)
    np.testing.assert_allclose(
        updated["batch_stats"]["BatchNorm_0"]["mean"], 0.9 * before + 0.1 * seen, atol=1e-5
    )
    assert np.abs(training - head.apply(variables, x, train=False)).max() > 0.01


def test_classifier_is_one_dense_layer_with_bias():
    head, x = Classifier(5), photo_features()
    variables = randomized(jax.eval_shape(partial(head.init, train=False), KEY, x))
    dense = variables["params"]["Dense_0"]
    assert list(variables) == ["params"] and list(variables["params"]) == ["Dense_0"]
    expected = np.float64(x) @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    for train in (False, True):
        np.testing.assert_allclose(head.apply(variables, x, train), expected, atol=1e-5)


def test_make_head():
    made = make_head("projection", classes=10, layers=(64, 8), batch_norm=True, axis_name="data")
    assert made == Projection((64, 8), batch_norm=True, axis_name="data")
    made = make_head("projection", classes=10, layers=(64,), batch_norm_momentum=0.5)
    assert made == Projection((64,), batch_norm_momentum=0.5)
    made = make_head("classifier", classes=10, layers=(64,), dtype=jnp.bfloat16)
    assert made == Classifier(10, dtype=jnp.bfloat16)


def test_make_head_refuses_other_names():
    with pytest.raises(ValueError, match="head must be") as caught:
        make_head("linear", classes=10)
    assert str(caught.value) == "head must be one of projection, classifier; got 'linear'"


# Encoders by name.


def test_an_encoder_gets_the_options_that_it_has_attributes_for():
    options = configuration.base().model.to_dict() | {"depth": 50, "groups": 32, "group_width": 4}
    resnet = make_encoder(**options, axis_name="data")
    assert resnet == ResNet(50, groups=32, group_width=4, stem="cifar", axis_name="data",
                            dtype="float32")  # fmt: skip
    options |= {"name": "vit", "size": "ti", "patch": 4, "remat": True}
    assert make_encoder(**options) == ViT("ti", 4, remat=True, dtype="float32")
    with pytest.raises(ValueError, match="encoder must be one of resnet, vit; got 'cnn'"):
        make_encoder("cnn")


class Means(nn.Module):
    """Of each channel, times the width; takes images of any size."""

    width: float = 1.0
    offset: float = 3.0

    @nn.compact
    def __call__(self, images, train):
        return self.width * images.mean((1, 2)) + self.offset


def test_an_encoder_that_was_added_is_built_from_a_configuration(monkeypatch):
    config = configuration.load("digits")
    config.model.update(name="means", width=2.0)
    config.data.image_size = 1
    with pytest.raises(ValueError, match=r"resnet, vit; got 'means'; one of your own is added to"):
        validate(config)
    monkeypatch.setitem(ENCODERS, "means", Means)
    validate(config)
    model = stages.build_model(config, "linear", classes=10)
    assert model.encoder == Means(width=2.0)
    images = jax.random.uniform(jax.random.key(0), (4, 1, 1, 1))
    (features, logits), _ = model.init_with_output(jax.random.key(1), images, train=False)
    np.testing.assert_allclose(features, 2 * images[:, 0, 0] + 3, rtol=1e-6)
    assert logits.shape == (4, 10)
