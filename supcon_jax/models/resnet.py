"""Residual networks, version 1.5 (the stride of a bottleneck is in its 3x3 convolution)."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Stem = Literal["cifar", "imagenet"]
Shortcut = Literal["projection", "identity"]

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
    inner: int  # of the 3x3 convolution of a bottleneck
    groups: int  # of that convolution
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
            grouped = partial(self.conv, feature_group_count=self.groups)
            x = nn.relu(self.norm()(self.conv(self.inner, 1, 1)(x)))
            x = nn.relu(self.norm()(grouped(self.inner, 3, stride)(x)))
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

    The max-pool of the ImageNet stem pads by one pixel on each side, as in PyTorch. Features: 512 x
    width (depth below 50) or 2048 x width.

    Bottlenecks with `groups` and `group_width` are those of ResNeXt (32 x 4 for "32x4d"; 64 x 2
    with `zero_init_residual=False` in the authors' TensorFlow code) and of Wide ResNet (1 x 128).
    Their middle convolution has `filters * group_width / 64 * groups` filters.

    Attributes:
      depth: 10, 18, 34, 50, 101, 152 or 200.
      width: multiplies all numbers of filters.
      groups: of the 3x3 convolution of a bottleneck.
      group_width: filters of each of these groups where a block has 64 filters.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool) or "cifar" (3x3, stride 1).
      first_shortcut: of the first block where its input has the shape of its output (depth below
        50): "projection", as in the authors' TensorFlow code, or "identity", as in torchvision.
      zero_init_residual: start each block as its shortcut (last batch-norm scale 0).
      batch_norm_momentum: share of the running statistics that stays at each step.
      remat: compute each block again in the backward pass instead of keeping its activations:
        the same values in less memory, at the price of a second forward pass.
      dtype: type of the computation; None follows the input and the parameters.
      axis_name: mapped axis whose devices share batch statistics; None keeps them local.

    Raises:
      ValueError: an unknown depth, stem or shortcut; groups without bottlenecks; numbers of filters
        that are not whole.

    References:
      He et al., 2015, https://arxiv.org/abs/1512.03385; Xie et al., 2016,
      https://arxiv.org/abs/1611.05431 (ResNeXt);
      https://github.com/google-research/google-research/tree/master/supcon (parameter counts and
      initialisation); https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py
      (groups and widths).
    """

    depth: int
    width: float = 1.0
    groups: int = 1
    group_width: int = 64
    stem: Stem = "imagenet"
    first_shortcut: Shortcut = "projection"
    zero_init_residual: bool = True
    batch_norm_momentum: float = 0.9
    remat: bool = False
    dtype: Any = None
    axis_name: str | None = None

    def __post_init__(self) -> None:
        check_choice("depth", self.depth, DEPTHS)
        check_choice("stem", self.stem, get_args(Stem))
        check_choice("first_shortcut", self.first_shortcut, get_args(Shortcut))
        _check_filters(self.depth, self.width, self.groups, self.group_width)
        super().__post_init__()

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
            momentum=self.batch_norm_momentum,
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
        counts, bottleneck = DEPTHS[self.depth]
        identity = self.first_shortcut == "identity" and not bottleneck
        make_block = nn.remat(Block) if self.remat else Block
        for group, count in enumerate(counts):
            filters = _filters(group, self.width)
            for block in range(count):
                x = make_block(
                    filters=filters,
                    inner=filters * self.group_width // 64 * self.groups,
                    groups=self.groups,
                    stride=2 if group > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    project=block == 0 and not (identity and group == 0),
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


def _filters(group: int, width: float) -> int:
    return int(64 * 2**group * width)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def _check_filters(depth: int, width: float, groups: int, group_width: int) -> None:
    """Refuse numbers of filters that the network cannot have."""
    if min(64 * width, groups, group_width) < 1:
        raise ValueError(
            "width must be at least 1/64, groups and group_width at least 1; "
            f"got {width}, {groups} and {group_width}"
        )
    if (groups, group_width) != (1, 64) and not DEPTHS[depth][1]:
        deep = ", ".join(str(depth) for depth, (_, bottleneck) in DEPTHS.items() if bottleneck)
        raise ValueError(
            f"groups={groups} and group_width={group_width} need bottlenecks, which depths {deep} "
            f"have; got depth {depth}"
        )
    for filters in (_filters(group, width) for group in range(len(DEPTHS[depth][0]))):
        if filters * group_width % 64:
            raise ValueError(
                f"width={width} and group_width={group_width} make groups of {filters} * "
                f"{group_width} / 64 = {filters * group_width / 64:g} filters; choose them so that "
                "this is a whole number"
            )
