"""Encoder weights from and to PyTorch, by the names of torchvision's residual networks."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import flax.linen as nn
import jax
import numpy as np

from supcon_jax.models.resnet import DEPTHS, ResNet

Arrays = dict[str, np.ndarray]

PREFIXES = ("module.", "encoder.", "encoder_q.", "backbone.")  # "encoder_q." is MoCo's
WRAPPERS = ("state_dict", "model")  # entries of a checkpoint that hold the weights

# Our names of modules and of their leaves -> torchvision's.
MODULES = {
    "Conv": "conv",
    "BatchNorm": "bn",
    "conv_stem": "conv1",
    "norm_stem": "bn1",
    "conv_shortcut": "downsample.0",
    "norm_shortcut": "downsample.1",
}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Depth, groups and their width -> torchvision's function that makes the network.
TORCHVISION = {
    (18, 1, 64): "resnet18",
    (34, 1, 64): "resnet34",
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (152, 1, 64): "resnet152",
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
}


def load_torch_encoder(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """The encoder in a file of PyTorch weights, as `encoder_from_torch` gives it.

    Arrays are read and no code in the file is run.

    Args:
      path: `.npz` (`numpy.savez(path, **arrays)`), `.safetensors`, or `.pth`, `.pt` or `.tar` of
        `torch.save`: the state dict, or a dict with it under "state_dict" or "model".
      model: the `ResNet` to fill.

    Returns:
      {"params": ..., "batch_stats": ...} of `model`, float32 NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: torch or safetensors, which reads this kind of file, is not installed.
      ValueError: another kind of file, one that cannot be read, or weights of another network.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    read = READERS.get(suffix)
    if read is None:
        raise ValueError(f"{path}: weights are read from {', '.join(READERS)} files only")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights")
    try:
        return encoder_from_torch(read(path), model)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading it needs a library that is not installed ({error}); pip install "
            f"{'safetensors' if suffix == '.safetensors' else 'torch'}, or save it as .npz"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def encoder_from_torch(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A PyTorch residual network's parameters and running statistics in the tree of `model`.

    Names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`) or those of
    the authors' PyTorch code (`shortcut` for `downsample`), behind any of "module.", "encoder.",
    "encoder_q." and "backbone.". What is not behind such a prefix where others are (a head), `fc`
    and `num_batches_tracked` are left out. In inference mode the features are PyTorch's for images
    normalised alike: torchvision's ImageNet weights expect RGB in [0, 1], less (0.485, 0.456,
    0.406), divided by (0.229, 0.224, 0.225). Depths 18 and 34 have `first_shortcut="identity"` in
    both codes, and the authors' have `stem="cifar"`.

    Args:
      state_dict: name -> tensor or array; kernels [out, in, height, width].
      model: the `ResNet` to fill.

    Returns:
      {"params": ..., "batch_stats": ...} of `model`, float32 NumPy arrays; kernels [height, width,
      in, out].

    Raises:
      ValueError: the model is no `ResNet`, or names or shapes are not its own; says what differs.

    References:
      https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py;
      https://github.com/HobbitLong/SupContrast/blob/master/networks/resnet_big.py.
    """
    if not isinstance(model, ResNet):
        raise ValueError(
            f"PyTorch weights are read into a ResNet, the model is {type(model).__name__}"
        )
    arrays = _encoder_arrays(state_dict)
    tree = _shapes_of(model, channels=_kernel_shape(arrays, "conv1.weight")[1] or 3)
    shapes = {_torch_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
    _check_same(arrays, {name: _torch_layout(shape) for name, shape in shapes.items()}, model)
    return jax.tree_util.tree_map_with_path(lambda path, _: _ours(arrays[_torch_name(path)]), tree)


def encoder_to_torch(variables: Mapping[str, Any]) -> Arrays:
    """A `ResNet`'s parameters and running statistics under torchvision's names.

    The inverse of `encoder_from_torch`; the network of torchvision that `torchvision_name` names
    takes the arrays, but for `fc`, and gives the same features in inference mode.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a `ResNet`.

    Returns:
      Name -> float32 NumPy array; kernels [out, in, height, width].
    """
    tree = {part: variables[part] for part in ("params", "batch_stats")}
    return {
        _torch_name(path): _theirs(np.asarray(leaf, np.float32))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def torchvision_name(encoder: nn.Module, channels: int) -> tuple[str | None, str | None]:
    """The function of `torchvision.models` whose network is the encoder, its last layer aside.

    Args:
      encoder: of a run.
      channels: of its images.

    Returns:
      (its name, None), or (None, why there is none).
    """
    if not isinstance(encoder, ResNet):
        return None, f"the encoder is a {type(encoder).__name__}, torchvision's are ResNets"
    depth, groups, group_width = encoder.depth, encoder.groups, encoder.group_width
    name = TORCHVISION.get((depth, groups, group_width))
    if name is None:
        kind = f"depth={depth}, groups={groups}, group_width={group_width}"
        return None, f"torchvision has no ResNet of {kind}"
    fields: dict[str, tuple[Any, Any]] = {  # torchvision's value and the run's
        "model.width": (1.0, encoder.width),
        "model.stem": ("imagenet", encoder.stem),
        "data.channels": (3, channels),
    }
    if not DEPTHS[depth][1]:
        fields["model.first_shortcut"] = ("identity", encoder.first_shortcut)
    differing = ((field, *values) for field, values in fields.items() if values[0] != values[1])
    others = ", ".join(f"{field}={theirs} ({ours} here)" for field, theirs, ours in differing)
    return (None, f"its {name} has {others}") if others else (name, None)


def _encoder_arrays(state_dict: Mapping[str, Any]) -> Arrays:
    """The encoder's arrays, by torchvision's names without a prefix."""
    entries = {str(name): value for name, value in state_dict.items()}
    while prefix := next((p for p in PREFIXES if any(n.startswith(p) for n in entries)), None):
        entries = {
            name.removeprefix(prefix): value
            for name, value in entries.items()
            if name.startswith(prefix)
        }
    return {
        name.replace(".shortcut.", ".downsample."): _array(name, value)
        for name, value in entries.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


def _array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor, perhaps of a type that NumPy has not (bfloat16)
        value = value.detach().cpu().float().numpy()
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is no array of numbers but a {type(value).__name__}") from None


def _shapes_of(model: ResNet, channels: int) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, model.stride, model.stride, channels), np.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def _torch_name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    """`params/group0_block1/Conv_2/kernel` -> `layer1.1.conv3.weight`."""
    *modules, leaf = (entry.key for entry in path[1:])
    return ".".join([*map(_torch_module, modules), LEAVES[leaf]])


def _torch_module(name: str) -> str:
    """`group0_block1` -> `layer1.1`, `Conv_2` -> `conv3`, `norm_stem` -> `bn1`."""
    if block := re.fullmatch(r"group(\d+)_block(\d+)", name):
        return f"layer{int(block[1]) + 1}.{block[2]}"
    if layer := re.fullmatch(r"(Conv|BatchNorm)_(\d+)", name):
        return f"{MODULES[layer[1]]}{int(layer[2]) + 1}"
    return MODULES[name]


def _torch_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape


def _ours(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


def _theirs(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def _check_same(arrays: Arrays, expected: Mapping[str, tuple[int, ...]], model: ResNet) -> None:
    """Refuse names and shapes that are not the expected ones, in one line that says which."""
    problems = {
        "missing": [name for name in expected if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "of another shape": [
            f"{name} {arrays[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = [_listed(kind, names) for kind, names in problems.items() if names]
        raise ValueError(
            f"the weights are not those of the model: {'; '.join(listed)}{_hint(arrays, model)}"
        )


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _hint(arrays: Arrays, model: ResNet) -> str:
    """Which fields of the model would have to be others, as far as names and shapes tell."""
    found = {
        field: value
        for field, value in _fields(arrays, model).items()
        if value is not None and value != getattr(model, field)
    }
    theirs = ", ".join(f"{field}={value!r}" for field, value in found.items())
    ours = ", ".join(f"{field}={getattr(model, field)!r}" for field in found)
    return f"; they are of a ResNet with {theirs}, the model has {ours}" if found else ""


def _fields(arrays: Arrays, model: ResNet) -> dict[str, Any]:
    filters, _, stem, _ = _kernel_shape(arrays, "conv1.weight")
    inner, group_inner, _, _ = _kernel_shape(arrays, "layer1.0.conv2.weight")
    if not filters or not group_inner:
        return {}
    blocks = Counter(re.findall(r"^layer(\d+)\.\d+\.conv1\.weight$", "\n".join(arrays), re.M))
    counts = tuple(blocks[group] for group in sorted(blocks))
    bottleneck = "layer1.0.conv3.weight" in arrays
    projected = "layer1.0.downsample.0.weight" in arrays
    return {
        "depth": next((d for d, shape in DEPTHS.items() if shape == (counts, bottleneck)), None),
        "width": model.width if int(64 * model.width) == filters else filters / 64,
        "groups": inner // group_inner if bottleneck else 1,
        "group_width": group_inner * 64 // filters if bottleneck else 64,
        "stem": {7: "imagenet", 3: "cifar"}.get(stem),
        "first_shortcut": None if bottleneck else "projection" if projected else "identity",
    }


def _kernel_shape(arrays: Arrays, name: str) -> tuple[int, ...]:
    """Shape of a kernel, zeros where it is missing or has not four axes."""
    shape = arrays[name].shape if name in arrays else ()
    return shape if len(shape) == 4 else (0, 0, 0, 0)


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (BadZipFile, EOFError, TypeError, ValueError) as error:
        raise ValueError("cannot be read as arrays of numpy.savez") from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    failures = (import_module("safetensors").SafetensorError, TypeError, KeyError)
    try:
        return import_module("safetensors.numpy").load_file(path)
    except failures as error:
        raise ValueError(f"cannot be read as safetensors: {error}") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    torch = import_module("torch")
    try:
        with torch.serialization.safe_globals([Namespace]):  # flags, in the authors' checkpoints
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            "is damaged or holds more than tensors; save them alone with "
            "torch.save(model.state_dict(), path)"
        ) from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"holds a {type(loaded).__name__}, not the dict of a model's tensors")
    return loaded


READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".tar": _read_torch,
}
