"""Residual networks, version 1.5 (the stride of a bottleneck is in its 3x3 convolution)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Stem = Literal["cifar", "imagenet"]

# Depth -> (blocks in each of the four groups, whether they are bottlenecks).
DEPTHS: dict[int, tuple[tuple[int, ...], bool]] = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 for a bottleneck, and a shortcut around them."""

    filters: int
    stride: int
    bottleneck: bool
    project: bool  # a 1x1 convolution on the shortcut
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    last_scale: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = 4 * self.filters if self.bottleneck else self.filters
        stride, residual = self.stride, x
        if self.bottleneck:
            x = nn.relu(self.norm()(self.conv(self.filters, 1, 1)(x)))
            x = nn.relu(self.norm()(self.conv(self.filters, 3, stride)(x)))
            x = self.conv(width, 1, 1)(x)
        else:
            x = nn.relu(self.norm()(self.conv(self.filters, 3, stride)(x)))
            x = self.conv(width, 3, 1)(x)
        x = self.norm(scale_init=self.last_scale)(x)
        if self.project:
            residual = self.norm(name="norm_shortcut")(
                self.conv(width, 1, stride, name="conv_shortcut")(residual)
            )
        return nn.relu(x + residual)


class ResNet(nn.Module):
    """Images to one embedding each: `[n, height, width, channels]` -> `[n, features]`.

    The first block of every group has a projection shortcut, also group 0 of the 18- and 34-layer
    networks, as in the authors' TensorFlow code. The max-pool of the ImageNet stem pads by one
    pixel on each side, as in PyTorch. Features: 512 x width (depth below 50) or 2048 x width.

    Attributes:
      depth: 10, 18, 34, 50, 101, 152 or 200.
      width: multiplies all numbers of filters.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool) or "cifar" (3x3, stride 1).
      zero_init_residual: start each block as its shortcut (last batch-norm scale 0).
      dtype: type of the computation; None follows the input and the parameters.
      axis_name: mapped axis whose devices share batch statistics; None keeps them local.

    References:
      He et al., 2015, https://arxiv.org/abs/1512.03385; https://github.com/google-research/
      google-research/tree/master/supcon (parameter counts and initialisation).
    """

    depth: int
    width: float = 1.0
    stem: Stem = "imagenet"
    zero_init_residual: bool = True
    dtype: Any = None
    axis_name: str | None = None

    @property
    def stride(self) -> int:
        """Pixels of the image to one of the last feature map: the smallest useful image side."""
        return 32 if self.stem == "imagenet" else 8

    @nn.compact
    def __call__(
        self, images: Float[Array, "n height width channels"], train: bool
    ) -> Float[Array, "n features"]:
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)

        x = conv(int(64 * self.width), kernel, stride, name="conv_stem")(images)
        x = nn.relu(norm(name="norm_stem")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        groups, bottleneck = DEPTHS[self.depth]
        for group, blocks in enumerate(groups):
            for block in range(blocks):
                x = Block(
                    filters=int(64 * 2**group * self.width),
                    stride=2 if group > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    project=block == 0,
                    conv=conv,
                    norm=norm,
                    last_scale=last_scale,
                    name=f"group{group}_block{block}",
                )(x)
        return jnp.mean(x, axis=(1, 2))


def _conv(filters: int, kernel: int, stride: int, **options: Any) -> nn.Conv:
    # The same padding on both sides at any stride; "SAME" would shift strided ones by a pixel.
    pad = (kernel - 1) // 2
    return nn.Conv(
        filters,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        **options,
    )
