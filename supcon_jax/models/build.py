"""Encoders and heads from the fields of a configuration."""

from dataclasses import fields
from typing import Any

import flax.linen as nn

from supcon_jax.models.heads import INITIALIZERS, Classifier, MarginClassifier, Projection
from supcon_jax.models.resnet import ResNet, check_choice
from supcon_jax.models.vit import ViT

# Values of `config.model.name`. Modules from images `[n, height, width, channels]` and `train` to
# features `[n, features]`; a `stride` is the smallest side of an image that they take.
ENCODERS: dict[str, type[nn.Module]] = {"resnet": ResNet, "vit": ViT}


def make_encoder(name: str, **options: Any) -> nn.Module:
    """The encoder of a recipe; options that it has no attribute for are not looked at.

    Args:
      name: in `ENCODERS`.
      options: fields of `config.model`; `dtype` of the computation, None follows the input and the
        parameters; `axis_name`, the mapped axis whose devices share batch statistics, None keeps
        them local. Attributes of the module that are not among them keep their defaults.

    Raises:
      ValueError: another name.
    """
    check_choice("encoder", name, ENCODERS)
    own = {field.name for field in fields(ENCODERS[name])}
    return ENCODERS[name](**{field: value for field, value in options.items() if field in own})


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
    check_choice("head", name, ("projection", "classifier"))
    check_choice("kernel_init", kernel_init, INITIALIZERS)
    if name == "projection":
        return Projection(
            tuple(layers), batch_norm, kernel_init, batch_norm_momentum, dtype, axis_name
        )
    if margin > 1:
        return MarginClassifier(classes, kernel_init)
    return Classifier(classes, kernel_init, dtype)
