"""Exported features, computed by PyTorch alone, beside those of supcon_jax.embed.

    python in_pytorch.py EXPORTED PHOTOS.npz

This one takes every width, both stems and both first shortcuts. torchvision's `resnet18()` takes
the same file where `torchvision` in EXPORTED/card.json names it: docs/inference.md.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn import functional


def features(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The forward pass of a ResNet-18: `[n, 3, size, size] -> [n, dim]`."""

    def conv(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(weights[f"{name}.{kind}"] for kind in kinds))

    large = weights["conv1.weight"].shape[-1] == 7
    x = torch.relu(norm(conv(images, "conv1", 2 if large else 1), "bn1"))
    x = functional.max_pool2d(x, 3, 2, 1) if large else x
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = torch.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in weights:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = torch.relu(x + y)
    return x.mean((2, 3))


def pixels(file: str, how: dict) -> torch.Tensor:
    """An image as the card says: the middle square, scaled, its middle cut out, normalised."""
    whole, size = how["middle_square"], how["middle_crop"]
    image = ImageOps.fit(Image.open(file).convert("RGB"), (whole, whole), Image.Resampling.BILINEAR)
    square, edge = np.asarray(image), (whole - size) // 2
    middle = square[edge : edge + size, edge : edge + size] / 255
    return torch.tensor((middle - how["mean"]) / how["std"], dtype=torch.float32).permute(2, 0, 1)


def main(exported: str, index: str) -> None:
    weights = load_file(Path(exported, "encoder.safetensors"))
    card = json.loads(Path(exported, "card.json").read_text())
    with np.load(index) as saved:
        paths, expected = saved["path"][:32], saved["features"][:32]
    with torch.inference_mode():
        images = torch.stack([pixels(path, card["preprocessing"]) for path in paths])
        found = features(weights, images)
        found = (functional.normalize(found) if card["features_of_length_1"] else found).numpy()
    print(f"{len(found)} images, features of {found.shape[1]} numbers")
    print(
        f"largest difference {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
