"""Encoders and heads: the only folder that defines linen modules."""

from supcon_jax.models.heads import Classifier, Model, Projection, make_head
from supcon_jax.models.resnet import DEPTHS, ResNet

__all__ = ["DEPTHS", "Classifier", "Model", "Projection", "ResNet", "make_head"]
