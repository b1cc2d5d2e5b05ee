"""What sits on the encoder: a projection for the contrastive loss or a classifier, and the pair."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from supcon_jax.losses import l2_normalize

INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "lecun_normal": nn.initializers.lecun_normal(),
    "glorot_uniform": nn.initializers.glorot_uniform(),
    "normal_0.01": nn.initializers.normal(0.01),
    "zeros": nn.initializers.zeros,
}


class Projection(nn.Module):
    """Linear or MLP projection to the unit sphere: `[n, features]` -> `[n, layers[-1]]`.

    ReLU between the layers; the last has neither bias, batch norm nor activation.

    Attributes:
      layers: output sizes; one entry is a single linear map.
      batch_norm: normalise the hidden layers, which then have no bias.
      kernel_init: name in `INITIALIZERS`.
      batch_norm_momentum: share of the running statistics that stays at each step.
      dtype: type of the computation; None follows the input and the parameters.
      axis_name: mapped axis whose devices share batch statistics; None keeps them local.

    References:
      Khosla et al., 2020, https://arxiv.org/abs/2004.11362, section 3.1 (Proj).
    """

    layers: tuple[int, ...] = (128,)
    batch_norm: bool = False
    kernel_init: str = "lecun_normal"
    batch_norm_momentum: float = 0.9
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n features"], train: bool) -> Float[Array, "n projection"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=INITIALIZERS[self.kernel_init])
        for size in self.layers[:-1]:
            x = dense(size, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.batch_norm_momentum,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                )(x)
            x = nn.relu(x)
        x = dense(self.layers[-1], use_bias=False)(x)
        return l2_normalize(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


class Classifier(nn.Module):
    """One dense layer: `[n, features]` -> logits `[n, classes]`, at least float32."""

    classes: int
    kernel_init: str = "lecun_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n features"], train: bool) -> Float[Array, "n classes"]:
        del train  # the same in training and inference, as every head has the same arguments
        init = INITIALIZERS[self.kernel_init]
        x = nn.Dense(self.classes, kernel_init=init, dtype=self.dtype)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class MarginClassifier(nn.Module):
    """One dense layer without a bias, for large-margin softmax.

    In training the outputs are `[n, 2 classes]`: the logits x . w_j, then |x|^2 |w_j|^2, which
    `losses.with_margin` needs; else the logits alone. Float32 at least.
    """

    classes: int
    kernel_init: str = "lecun_normal"

    @nn.compact
    def __call__(self, x: Float[Array, "n features"], train: bool) -> Float[Array, "n outputs"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (x.shape[-1], self.classes)
        w = self.param("kernel", INITIALIZERS[self.kernel_init], shape).astype(x.dtype)
        logits = x @ w
        if not train:
            return logits
        squared = jnp.sum(x * x, -1, keepdims=True) * jnp.sum(w * w, 0, keepdims=True)
        return jnp.concatenate([logits, squared], -1)


class Model(nn.Module):
    """An encoder and the head of a training stage.

    Attributes:
      encoder: images to features.
      head: features to outputs.
      normalize: give the head the features at length 1.
      frozen: top-level parts ("encoder") that stay in inference mode during training.
    """

    encoder: nn.Module
    head: nn.Module
    normalize: bool = False
    frozen: tuple[str, ...] = ()

    def __call__(
        self, images: Float[Array, "n height width channels"], train: bool
    ) -> tuple[Float[Array, "n features"], Float[Array, "n outputs"]]:
        """Features before normalisation, and the outputs of the head."""
        features = self.encoder(images, train and "encoder" not in self.frozen)
        inputs = l2_normalize(features) if self.normalize else features
        return features, self.head(inputs, train and "head" not in self.frozen)
