"""Encoders and heads from the fields of a configuration."""

from typing import Any, Literal

import flax.linen as nn

from supcon_jax.models.heads import INITIALIZERS, Classifier, MarginClassifier, Projection
from supcon_jax.models.resnet import ResNet, Stem
from supcon_jax.models.vit import ViT


def make_encoder(
    name: str,
    *,
    depth: int,
    width: float,
    groups: int,
    group_width: int,
    stem: Stem,
    first_shortcut: Literal["projection", "identity"],
    zero_init_residual: bool,
    size: Literal["ti", "s", "b"],
    patch: int,
    pool: Literal["token", "mean"],
    batch_norm_momentum: float = 0.9,
    remat: bool = False,
    dtype: Any = None,
    axis_name: str | None = None,
) -> ResNet | ViT:
    """The encoder of a recipe; fields that it has no use for are not looked at.

    Args:
      name: "resnet" (`depth` to `zero_init_residual`, see `ResNet`) or "vit" (`size`, `patch`,
        `pool`, see `ViT`).
      depth: of the ResNet.
      width: of the ResNet, multiplies the filters.
      groups: of the ResNet's 3x3 convolutions; more than 1 is a ResNeXt.
      group_width: of each, in filters of the first group.
      stem: of the ResNet.
      first_shortcut: of the ResNet.
      zero_init_residual: of the ResNet.
      size: of the Vision Transformer.
      patch: of the Vision Transformer, in pixels.
      pool: of the Vision Transformer.
      batch_norm_momentum: of the ResNet.
      remat: compute each block again in the backward pass instead of keeping its activations.
      dtype: of the computation; None follows the input and the parameters.
      axis_name: mapped axis whose devices share batch statistics; None keeps them local.

    Raises:
      ValueError: another name.
    """
    if name == "resnet":
        return ResNet(
            depth=depth,
            width=width,
            groups=groups,
            group_width=group_width,
            stem=stem,
            first_shortcut=first_shortcut,
            zero_init_residual=zero_init_residual,
            batch_norm_momentum=batch_norm_momentum,
            remat=remat,
            dtype=dtype,
            axis_name=axis_name,
        )
    if name == "vit":
        return ViT(size=size, patch=patch, pool=pool, remat=remat, dtype=dtype)
    raise ValueError(f"encoder must be 'resnet' or 'vit', got {name!r}")


def make_head(
    name: str,
    *,
    classes: int,
    layers: tuple[int, ...] = (),
    batch_norm: bool = False,
    kernel_init: str = "lecun_normal",
    margin: int = 1,
    batch_norm_momentum: float = 0.9,
    dtype: Any = None,
    axis_name: str | None = None,
) -> nn.Module:
    """The head of a stage: "projection" (see `Projection`) or "classifier" (`classes`).

    A classifier whose objective has a `margin` above 1 is a `MarginClassifier`.

    Raises:
      ValueError: another name, or another initial value than those of `INITIALIZERS`.
    """
    if kernel_init not in INITIALIZERS:
        choices = ", ".join(INITIALIZERS)
        raise ValueError(f"kernel_init must be one of {choices}; got {kernel_init!r}")
    if name == "projection":
        return Projection(
            tuple(layers), batch_norm, kernel_init, batch_norm_momentum, dtype, axis_name
        )
    if name == "classifier" and margin > 1:
        return MarginClassifier(classes, kernel_init)
    if name == "classifier":
        return Classifier(classes, kernel_init, dtype)
    raise ValueError(f"head must be 'projection' or 'classifier', got {name!r}")
