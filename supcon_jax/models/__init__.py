"""Encoders and heads: the only folder that defines linen modules."""

from supcon_jax.models.build import ENCODERS, make_encoder, make_head
from supcon_jax.models.heads import Classifier, MarginClassifier, Model, Projection
from supcon_jax.models.resnet import DEPTHS, ResNet
from supcon_jax.models.torch_weights import (
    encoder_from_torch,
    encoder_to_torch,
    load_torch_encoder,
)
from supcon_jax.models.vit import ViT

__all__ = [
    "DEPTHS",
    "ENCODERS",
    "Classifier",
    "MarginClassifier",
    "Model",
    "Projection",
    "ResNet",
    "ViT",
    "encoder_from_torch",
    "encoder_to_torch",
    "load_torch_encoder",
    "make_encoder",
    "make_head",
]
