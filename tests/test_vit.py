"""The Vision Transformer: sizes, a forward pass in plain NumPy, pooling, precision, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax
from sklearn.datasets import load_sample_image

from supcon_jax.models import ViT
from supcon_jax.models.vit import SIZES, Size

KEY = jax.random.key(0)
PHOTO = load_sample_image("flower.jpg")[0:400:4, 100:500:4].astype(np.float32) / 127.5 - 1
PATCH = 4

# Trainable parameters at 224 x 224 in patches of 16 with a classifier of 1,000 classes:
# https://github.com/huggingface/pytorch-image-models, as 5.7, 22.1 and 86.6 M in DeiT's table 1.
PUBLISHED = {"ti": 5_717_416, "s": 22_050_664, "b": 86_567_656}


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    """A network of two blocks, quick to compile."""
    monkeypatch.setitem(SIZES, "tiny", Size(depth=2, width=24, heads=3))


small = partial(ViT, "tiny", patch=PATCH)


def photographs(count, height, width=None):
    """`[count, height, width, 3]`: parts of a photograph."""
    width = width or height
    return np.stack(
        [PHOTO[25 * i : 25 * i + height, 30 * i : 30 * i + width] for i in range(count)]
    )


def shapes_of(model, images):
    return jax.eval_shape(partial(model.init, train=False), KEY, images)


def randomized(shapes, seed=0):
    """Random values for all parameters; attention is far from uniform and tokens are small."""
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        names = {entry.key for entry in path}
        if "scale" in names:
            return random.uniform(0.5, 1.5, leaf.shape)
        fan_in = leaf.shape[0] if names & {"query", "key", "value"} else np.prod(leaf.shape[:-1])
        value = random.normal(0, 1.5 * fan_in**-0.5 if "kernel" in names else 0.5, leaf.shape)
        # What is added up to tokens: of a size that shows the epsilon of the layer norms.
        return 0.1 * value if names & {"embed", "position", "token", "out", "mlp_out"} else value

    return jax.tree_util.tree_map_with_path(lambda *x: jnp.asarray(draw(*x), jnp.float32), shapes)


def in_float64(tree):
    return jax.tree.map(np.float64, tree)


def size_of(tree):
    return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(tree))


# Sizes.


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    variables = shapes_of(ViT(size, patch=16), jnp.zeros((1, 224, 224, 3)))
    width = SIZES[size].width
    assert list(variables) == ["params"]
    assert size_of(variables) + 1000 * (width + 1) == PUBLISHED[size]
    query = variables["params"]["block0"]["query"]["kernel"]
    assert query.shape == (width, width // 64, 64)  # in, heads, out


@pytest.mark.parametrize(("pool", "tokens"), [("token", 17), ("mean", 16)])
def test_features_and_tokens(pool, tokens):
    images = jnp.zeros((5, 8, 32, 3))
    model = ViT("ti", patch=PATCH, pool=pool)
    assert model.stride == PATCH
    variables = shapes_of(model, images)
    assert variables["params"]["position"].shape == (1, tokens, 192)
    assert ("token" in variables["params"]) == (pool == "token")
    out = jax.eval_shape(partial(model.apply, train=True), variables, images)
    assert (out.shape, out.dtype) == ((5, 192), jnp.float32)


# A forward pass in NumPy.


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return normal * params["scale"] + params["bias"]


def attention(x, params):
    """All heads of `[images, tokens, width]`."""
    query, key, value = (
        np.einsum("ntw,whd->nhtd", x, params[name]["kernel"]) + params[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    logits = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    assert logits.std() > 0.3  # far from uniform
    heads = softmax(logits, axis=-1) @ value
    return np.einsum("nhtd,hdw->ntw", heads, params["out"]["kernel"]) + params["out"]["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def block(x, params):
    x = x + attention(layer_norm(x, params["norm_attention"]), params)
    hidden = dense(layer_norm(x, params["norm_mlp"]), params["mlp_in"])
    return x + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, params["mlp_out"])


def features_of(images, params, pool):
    params = in_float64(params)
    kernel = params["embed"]["kernel"]
    tokens = [
        np.tensordot(images[:, row : row + PATCH, column : column + PATCH], kernel, 3)
        for row in range(0, images.shape[1], PATCH)
        for column in range(0, images.shape[2], PATCH)
    ]
    x = np.stack(tokens, axis=1) + params["embed"]["bias"]
    if pool == "token":
        token = np.broadcast_to(params["token"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([token, x], axis=1)
    x = x + params["position"]
    for name in sorted(name for name in params if name.startswith("block")):
        x = block(x, params[name])
    x = layer_norm(x, params["norm"])
    return x[:, 0] if pool == "token" else x.mean(axis=1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_forward_pass_equals_numpy(pool):
    model, images = small(pool=pool), np.float64(photographs(3, 12, 20))
    variables = in_float64(randomized(shapes_of(model, images)))
    actual = jax.jit(partial(model.apply, train=False))(variables, images)
    expected = features_of(images, variables["params"], pool)
    assert expected.std(axis=0).mean() > 0.05  # the images differ
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=5e-7)  # float32 softmax


def test_initial_values():
    model, images = ViT("tiny", patch=8), photographs(2, 64)
    params = jax.jit(partial(model.init, train=False))(KEY, images)["params"]
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name in ("kernel", "position", "token"):
            assert 0.03 < np.abs(leaf).max() <= 0.04
            # A normal distribution of deviation 1 cut at 2 has deviation 0.880.
            assert name == "token" or abs(leaf.std() / (0.880 * 0.02) - 1) < 0.1
        else:
            assert (leaf == (name == "scale")).all()


# What it refuses.


@pytest.mark.parametrize("sides", [(12, 18), (2, 12), (13, 12)])
def test_images_that_patches_do_not_divide_are_refused(sides):
    with pytest.raises(ValueError, match="multiples") as caught:
        shapes_of(small(), jnp.zeros((1, *sides, 3)))
    assert str(caught.value) == (
        "height and width of the images must be multiples of the patch, 4; "
        f"got {sides[0]} x {sides[1]}"
    )


def test_images_of_another_number_of_patches_are_refused():
    variables = shapes_of(small(), jnp.zeros((1, 12, 12, 3)))
    with pytest.raises(ValueError, match="positions") as caught:
        jax.eval_shape(partial(small().apply, train=False), variables, jnp.zeros((1, 16, 16, 3)))
    assert str(caught.value) == (
        "the images make 17 tokens, the model has positions for 10; "
        "use images of the size that it was initialised with"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size="l"), "size must be one of ti, s, b, tiny; got 'l'"),
        (dict(pool="max"), "pool must be one of token, mean; got 'max'"),
        (dict(patch=0), "patch must be at least 1 pixel, got 0"),
    ],
)
def test_unknown_fields_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        ViT(**options)


# Precision and memory.


def test_bfloat16_computes_so_with_float32_parameters():
    images, results = photographs(3, 12), {}
    for dtype in (None, jnp.bfloat16):
        model = small(dtype=dtype)
        shapes = shapes_of(model, images)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
        apply = partial(model.apply, train=True, capture_intermediates=True)
        outputs, inner = jax.jit(partial(apply, mutable=["intermediates"]))(
            randomized(shapes), images
        )
        expected = jnp.dtype(dtype or jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(inner)} == {expected}
        results[dtype] = np.float32(outputs)
    difference = np.abs(results[None] - results[jnp.bfloat16]).max()
    assert 1e-4 < difference < 0.1 * np.abs(results[None]).max()


def loss_and_gradients(model, variables, images):
    def loss(params):
        return jnp.sum(model.apply({"params": params}, images, train=True) ** 3)

    return jax.value_and_grad(loss)(variables["params"])


@pytest.mark.usefixtures("x64")
def test_remat_has_the_same_gradients():
    images = np.float64(photographs(2, 8))
    shapes = shapes_of(small(), images)
    assert shapes == shapes_of(small(remat=True), images)
    variables = in_float64(randomized(shapes))
    plain, again = (
        jax.jit(partial(loss_and_gradients, small(remat=remat)))(variables, images)
        for remat in (False, True)
    )
    assert plain[0].dtype == jnp.float64 and np.abs(plain[0]) > 0.1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), again, plain)


def test_remat_keeps_less():
    def kept(model):
        """Bytes that the backward pass reads, parameters included."""

        def backward(params):
            apply = partial(model.apply, images=images, train=True)
            return jax.vjp(lambda params: apply({"params": params}), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, shapes_of(model, images)["params"]))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    images = jnp.zeros((16, 32, 32, 3))
    assert kept(small(remat=True)) < kept(small()) / 5
