"""PyTorch weights: the same features as a PyTorch forward pass; files; what does not fit."""

import itertools
import os
import pickle
import re
import sys
from argparse import Namespace
from functools import partial
from types import ModuleType

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_image
from state_dicts import state_dict_of

from supcon_jax.models import (
    DEPTHS,
    ResNet,
    ViT,
    encoder_from_torch,
    encoder_to_torch,
    load_torch_encoder,
)
from supcon_jax.models.torch_weights import torchvision_name

PHOTO = load_sample_image("china.jpg")[:400:2, :400:2].astype(np.float32) / 127.5 - 1
IMAGES = np.stack([PHOTO[60 * i : 60 * i + 64, 50 * i : 50 * i + 64] for i in range(3)])
BASIC, BOTTLENECK = 3, 4  # depths, of five blocks


@pytest.fixture(autouse=True)
def small_depths(monkeypatch):
    """Networks of five blocks, quick to compile."""
    monkeypatch.setitem(DEPTHS, BASIC, ((2, 1, 1, 1), False))
    monkeypatch.setitem(DEPTHS, BOTTLENECK, ((2, 1, 1, 1), True))


def features_in_torch(state, images, groups=1):
    """The forward pass, from torch's functions alone."""
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(value) for name, value in state.items()}

    def conv(x, name, stride=1, groups=1):
        kernel = state[f"{name}.weight"]
        pad = kernel.shape[-1] // 2
        return torch.nn.functional.conv2d(x, kernel, None, stride, pad, 1, groups)

    def norm(x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        values = [state[f"{name}.{kind}"] for kind in names]
        return torch.nn.functional.batch_norm(x, *values, eps=1e-5)

    x = torch.tensor(images).permute(0, 3, 1, 2)
    imagenet = state["conv1.weight"].shape[-1] == 7
    x = torch.relu(norm(conv(x, "conv1", 2 if imagenet else 1), "bn1"))
    if imagenet:
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for layer, block in itertools.product(range(1, 5), range(9)):
        name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
        if f"{name}.conv1.weight" not in state:
            continue
        deep = f"{name}.conv3.weight" in state
        y = torch.relu(norm(conv(x, f"{name}.conv1", 1 if deep else stride), f"{name}.bn1"))
        y = conv(y, f"{name}.conv2", stride if deep else 1, groups)
        y = norm(y, f"{name}.bn2")
        if deep:
            y = norm(conv(torch.relu(y), f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in state:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        x = torch.relu(x + y)
    return x.mean((2, 3)).numpy()


small = partial(ResNet, width=0.125)


# Features.


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (BASIC, dict(stem="imagenet")),
        (BASIC, dict(stem="cifar", first_shortcut="identity")),
        (18, dict(stem="imagenet", first_shortcut="identity")),
        (BOTTLENECK, dict(stem="cifar")),
        (BOTTLENECK, dict(stem="imagenet", groups=4, group_width=16)),
        (BOTTLENECK, dict(stem="cifar", group_width=128, remat=True)),
    ],
    ids=["basic", "identity", "18", "bottleneck", "resnext", "wide"],
)
def test_features_equal_those_of_torch(depth, options):
    model = small(depth, **options)
    state = state_dict_of(model)
    variables = encoder_from_torch(state, model)
    actual = jax.jit(partial(model.apply, train=False))(variables, IMAGES)
    expected = features_in_torch(state, IMAGES, model.groups)
    assert expected.std(axis=0).mean() > 0.02
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [1, 3])
def test_tree_is_that_of_the_model(channels):
    model = small(BASIC)
    shape = jax.ShapeDtypeStruct((1, 32, 32, channels), np.float32)
    own = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), shape)
    read = encoder_from_torch(state_dict_of(model, channels), model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), own) == jax.tree.map(
        lambda x: (x.shape, x.dtype), read
    )
    assert {type(leaf) for leaf in jax.tree.leaves(read)} == {np.ndarray}


# Names.


@pytest.mark.parametrize(
    "prefix", ["module.", "encoder.", "backbone.", "encoder.module.", "module.encoder_q."]
)
def test_prefixes_are_taken_off_and_heads_left_out(prefix):
    state = state_dict_of(small(BASIC))
    named = {f"{prefix}{name}": value for name, value in state.items()}
    if prefix != "module.":
        named["module.head.0.weight" if prefix.startswith("module") else "head.0.weight"] = state[
            "fc.weight"
        ]
    assert_same(encoder_from_torch(named, small(BASIC)), encoder_from_torch(state, small(BASIC)))


def test_names_of_the_authors_code():
    """https://github.com/HobbitLong/SupContrast/blob/master/networks/resnet_big.py."""
    model = small(BASIC, stem="cifar", first_shortcut="identity")
    state = state_dict_of(model)
    named = {name.replace("downsample", "shortcut"): value for name, value in state.items()}
    assert sum("shortcut" in name for name in named) == 3 * 6
    assert_same(encoder_from_torch(named, model), encoder_from_torch(state, model))


@pytest.mark.parametrize("prefix", ["", "encoder.module."])
def test_names_of_the_authors_bottlenecks(prefix):
    """With a head beside the encoder, as `SupConResNet` of that code is saved."""
    model = small(BOTTLENECK, stem="cifar")
    state = state_dict_of(model)
    head = {"head.0.weight": state.pop("fc.weight")} if prefix else {}
    named = {
        f"{prefix}{name.replace('downsample', 'shortcut')}": value for name, value in state.items()
    }
    assert sum("shortcut" in name for name in named) == 4 * 6
    assert_same(encoder_from_torch(named | head, model), encoder_from_torch(state, model))


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# The way out.


# Parameters of torchvision's networks, from its page of models, and features of the last layer.
TORCHVISION = {
    "resnet18": (11_689_512, 512, dict(depth=18, first_shortcut="identity")),
    "resnet34": (21_797_672, 512, dict(depth=34, first_shortcut="identity")),
    "resnet50": (25_557_032, 2048, dict(depth=50)),
    "resnext50_32x4d": (25_028_904, 2048, dict(depth=50, groups=32, group_width=4)),
    "wide_resnet50_2": (68_883_240, 2048, dict(depth=50, group_width=128)),
}
DOWNSAMPLED = {18: {2, 3, 4}, 34: {2, 3, 4}, 50: {1, 2, 3, 4}}  # layers, in their first block


@pytest.mark.parametrize("name", TORCHVISION)
def test_what_is_exported_has_the_names_and_shapes_of_torchvision(name):
    parameters, features, options = TORCHVISION[name]
    model = ResNet(**options)
    assert torchvision_name(model, channels=3) == (name, None)
    exported = exported_shapes(model)
    expected = {key: np.shape(value) for key, value in state_dict_of(model).items()}
    assert exported == {
        key: shape
        for key, shape in expected.items()
        if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")
    }
    assert {key for key in exported if key.endswith("downsample.0.weight")} == {
        f"layer{layer}.0.downsample.0.weight" for layer in DOWNSAMPLED[model.depth]
    }
    trained = [shape for key, shape in exported.items() if ".running_" not in key]
    assert sum(map(np.prod, trained)) + 1000 * (features + 1) == parameters


def exported_shapes(model):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    tree = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)
    return {key: array.shape for key, array in encoder_to_torch(zeros).items()}


@pytest.mark.parametrize(
    ("model", "channels", "why"),
    [
        (ResNet(18), 3, "its resnet18 has model.first_shortcut=identity (projection here)"),
        (
            ResNet(18, first_shortcut="identity", stem="cifar", width=0.5),
            1,
            "its resnet18 has model.width=1.0 (0.5 here), model.stem=imagenet (cifar here), "
            "data.channels=3 (1 here)",
        ),
        (ResNet(50, stem="cifar"), 3, "its resnet50 has model.stem=imagenet (cifar here)"),
        (ResNet(200), 3, "torchvision has no ResNet of depth=200, groups=1, group_width=64"),
        (ViT("ti"), 3, "the encoder is a ViT, torchvision's are ResNets"),
    ],
    ids=["projection", "small", "cifar", "200", "vit"],
)
def test_a_network_that_torchvision_has_not_is_told(model, channels, why):
    assert torchvision_name(model, channels) == (None, why)


# What does not fit.


def refusal(state, model):
    with pytest.raises(ValueError, match="weights") as caught:
        encoder_from_torch(state, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_entries_are_named():
    state = state_dict_of(small(BASIC))
    for name in ("bn1.bias", "layer4.0.bn2.running_var"):
        del state[name]
    state["layer1.0.se.weight"] = np.zeros(3)
    state["layer2.0.conv1.weight"] = np.zeros((16, 8, 5, 5))
    assert refusal(state, small(BASIC)) == (
        "the weights are not those of the model: "
        "2 missing (layer4.0.bn2.running_var, bn1.bias); 1 unexpected (layer1.0.se.weight); "
        "1 of another shape (layer2.0.conv1.weight (16, 8, 5, 5) instead of (16, 8, 3, 3))"
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "hint"),
    [
        (dict(depth=50), dict(depth=18), ("depth=50", "depth=18")),
        (dict(depth=50), dict(depth=101), ("depth=50", "depth=101")),
        (dict(width=0.25), dict(width=0.125), ("width=0.25", "width=0.125")),
        (dict(width=0.3), dict(width=0.3, stem="cifar"), ("stem='imagenet'", "stem='cifar'")),
        (
            dict(first_shortcut="identity"),
            dict(first_shortcut="projection"),
            ("first_shortcut='identity'", "first_shortcut='projection'"),
        ),
        (
            dict(depth=BOTTLENECK, groups=4, group_width=16),
            dict(depth=BOTTLENECK),
            ("groups=4, group_width=16", "groups=1, group_width=64"),
        ),
        (
            dict(depth=BOTTLENECK, groups=1, group_width=128),
            dict(depth=BOTTLENECK, first_shortcut="identity"),
            ("group_width=128", "group_width=64"),
        ),
    ],
)
def test_hint_says_what_the_model_would_need(theirs, ours, hint):
    defaults = dict(depth=BASIC, width=0.125)
    state = state_dict_of(ResNet(**(defaults | theirs)))
    expected = f"; they are of a ResNet with {hint[0]}, the model has {hint[1]}"
    assert refusal(state, ResNet(**(defaults | ours))).endswith(expected)


def test_weights_of_something_else():
    message = refusal({"blocks.0.attn.qkv.weight": np.zeros((6, 2))}, small(BASIC))
    assert "1 unexpected (blocks.0.attn.qkv.weight)" in message and "ResNet with" not in message
    message = refusal(state_dict_of(small(BASIC)), ViT("ti"))
    assert message == "PyTorch weights are read into a ResNet, the model is ViT"
    with pytest.raises(ValueError, match=r"^epoch\.x is no array of numbers but a dict$"):
        encoder_from_torch({"epoch.x": {}}, small(BASIC))


# Files.


@pytest.fixture(scope="module")
def saved():
    """A model, weights as a file has them, and what they are in the model's tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEPTHS, BASIC, ((2, 1, 1, 1), False))
        model = small(BASIC)
        state = state_dict_of(model)
        return model, state, encoder_from_torch(state, model)


def test_npz(saved, tmp_path):
    model, state, expected = saved
    np.savez(tmp_path / "weights.npz", **state)
    assert_same(load_torch_encoder(tmp_path / "weights.npz", model), expected)
    assert_same(load_torch_encoder(str(tmp_path / "weights.npz"), model), expected)


def test_safetensors(saved, tmp_path):
    model, state, expected = saved
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(state, tmp_path / "weights.safetensors")
    assert_same(load_torch_encoder(tmp_path / "weights.safetensors", model), expected)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_torch_encoder(tmp_path / "weights.safetensors", model)


def test_safetensors_are_read_by_the_library(saved, tmp_path, monkeypatch):
    model, state, expected = saved
    library, numpy = ModuleType("safetensors"), ModuleType("safetensors.numpy")
    library.SafetensorError, read = type("SafetensorError", (Exception,), {}), []
    numpy.load_file = lambda path: read.append(path) or state
    monkeypatch.setitem(sys.modules, "safetensors", library)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", numpy)
    path = tmp_path / "weights.safetensors"
    path.touch()
    assert_same(load_torch_encoder(path, model), expected)
    assert read == [path]


def in_torch(state, dtype=None):
    torch = pytest.importorskip("torch")
    return {name: torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for name, x in state.items()}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pth", lambda state: state),
        (".pt", lambda state: {"state_dict": state, "epoch": 3}),
        (".tar", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
        (".PTH", lambda state: {"opt": Namespace(lr=0.5), "model": state, "epoch": 3}),
    ],
)
def test_files_of_torch(saved, tmp_path, suffix, wrap):
    torch = pytest.importorskip("torch")
    model, state, expected = saved
    torch.save(wrap(in_torch(state)), tmp_path / f"weights{suffix}")
    assert_same(load_torch_encoder(tmp_path / f"weights{suffix}", model), expected)


def test_bfloat16_of_torch(saved):
    torch = pytest.importorskip("torch")
    model, state, expected = saved
    read = encoder_from_torch(in_torch(state, torch.bfloat16), model)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2**-8), read, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(saved, tmp_path):
    torch = pytest.importorskip("torch")
    model, state, _ = saved
    torch.save(
        {"state_dict": in_torch(state), "x": MakesFolder(tmp_path / "run")}, tmp_path / "bad.pth"
    )
    with pytest.raises(ValueError, match=r"bad.pth: is damaged or holds more than tensors"):
        load_torch_encoder(tmp_path / "bad.pth", model)
    np.savez(tmp_path / "bad.npz", x=np.array([MakesFolder(tmp_path / "run")], dtype=object))
    with pytest.raises(ValueError, match=r"bad.npz: cannot be read as arrays"):
        load_torch_encoder(tmp_path / "bad.npz", model)
    assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "run")))
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_files_are_refused_in_one_line(saved, tmp_path, suffix, damage):
    model, state, _ = saved
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        pytest.importorskip("torch").save(in_torch(state), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no weights", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))}: (cannot be|is damaged)"
    ) as caught:
        load_torch_encoder(path, model)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(saved, tmp_path):
    model, state, _ = saved
    (tmp_path / "weights.h5").touch()
    expected = r"weights.h5: weights are read from .npz, .safetensors, .pth, .pt, .tar files only$"
    with pytest.raises(ValueError, match=expected):
        load_torch_encoder(tmp_path / "weights.h5", model)
    with pytest.raises(FileNotFoundError, match=r"none.pth: there is no such file of weights$"):
        load_torch_encoder(tmp_path / "none.pth", model)
    np.savez(tmp_path / "other.npz", **state)
    with pytest.raises(ValueError, match=r"other.npz: the weights are not those of the model"):
        load_torch_encoder(tmp_path / "other.npz", small(BASIC, stem="cifar"))
    torch = pytest.importorskip("torch")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth: holds a list, not the dict"):
        load_torch_encoder(tmp_path / "list.pth", model)


@pytest.mark.parametrize(
    ("suffix", "library"), [(".safetensors", "safetensors"), (".pth", "torch")]
)
def test_libraries_that_are_not_there_are_named(saved, tmp_path, monkeypatch, suffix, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / f"weights{suffix}").touch()
    with pytest.raises(ModuleNotFoundError, match=rf"pip install {library}, or save it as .npz$"):
        load_torch_encoder(tmp_path / f"weights{suffix}", saved[0])
