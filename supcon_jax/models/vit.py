"""Vision Transformers: images cut into patches, encoded as sequences."""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from supcon_jax.models.resnet import check_choice

Pool = Literal["token", "mean"]


class Size(NamedTuple):
    """Number of blocks, features of a token, attention heads."""

    depth: int
    width: int
    heads: int


SIZES = {"ti": Size(12, 192, 3), "s": Size(12, 384, 6), "b": Size(12, 768, 12)}

# Of kernels, class token and positions; cut off at two standard deviations.
TRUNCATED = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """Self-attention, then two dense layers, each after a layer norm and added to its input."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        width = x.shape[-1]
        options = {"dtype": self.dtype, "kernel_init": TRUNCATED}
        head = partial(nn.DenseGeneral, (self.heads, width // self.heads), **options)
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

        inner = norm(name="norm_attention")(x)
        query, key, value = (head(name=name)(inner) for name in ("query", "key", "value"))
        # The softmax is in float32 for any type.
        seen = jax.nn.dot_product_attention(query, key, value)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out", **options)(seen)

        inner = norm(name="norm_mlp")(x)
        hidden = nn.gelu(nn.Dense(4 * width, name="mlp_in", **options)(inner), approximate=False)
        return x + nn.Dense(width, name="mlp_out", **options)(hidden)


class ViT(nn.Module):
    """Images to one embedding each: `[n, height, width, channels]` -> `[n, features]`.

    A token a patch plus a learned position; twelve blocks with the norm before each branch; a last
    layer norm. Features: 192 ("ti"), 384 ("s") or 768 ("b"). No dropout, no batch norm.

    Initial values: kernels, class token and positions normal with standard deviation 0.02, cut off
    at twice that; biases 0; scales 1. The activation is the exact GELU, as in DeiT.

    Attributes:
      size: "ti", "s" or "b", see `SIZES`.
      patch: its side in pixels; height and width of the images are multiples of it.
      pool: "token" is the output of an additional class token; "mean" that of all patches, without
        a class token.
      remat: compute each block again in the backward pass instead of keeping its activations:
        the same values in less memory, at the price of a second forward pass.
      dtype: type of the computation; None follows the input and the parameters.

    Raises:
      ValueError: an unknown size or pool; images that the patches do not divide, or of another
        number of patches than there are positions.

    References:
      Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929; Touvron et al., 2020 (DeiT),
      https://arxiv.org/abs/2012.12877, https://github.com/facebookresearch/deit (sizes "ti", "s").
    """

    size: str = "s"
    patch: int = 16
    pool: Pool = "token"
    remat: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        check_choice("size", self.size, SIZES)
        check_choice("pool", self.pool, get_args(Pool))
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1 pixel, got {self.patch}")
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Pixels of the image to one token: the smallest useful image side."""
        return self.patch

    @nn.compact
    def __call__(
        self, images: Float[Array, "n height width channels"], train: bool
    ) -> Float[Array, "n features"]:
        del train  # the same in training and inference
        depth, width, heads = SIZES[self.size]
        side = (self.patch, self.patch)
        self._check_sides(*images.shape[1:3])
        x = nn.Conv(
            width, side, side, "VALID", dtype=self.dtype, kernel_init=TRUNCATED, name="embed"
        )(images)
        x = x.reshape(x.shape[0], -1, width)
        if self.pool == "token":
            token = self.param("token", TRUNCATED, (1, 1, width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, width)), x], axis=1)
        x = x + self._positions(x.shape[1], width).astype(x.dtype)
        make_block = nn.remat(Block) if self.remat else Block
        for block in range(depth):
            x = make_block(heads, dtype=self.dtype, name=f"block{block}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)

    def _positions(self, tokens: int, width: int) -> Float[Array, "1 tokens width"]:
        if self.has_variable("params", "position"):
            there: int = self.get_variable("params", "position").shape[1]
            if there != tokens:
                raise ValueError(
                    f"the images make {tokens} tokens, the model has positions for {there}; "
                    "use images of the size that it was initialised with"
                )
        return self.param("position", TRUNCATED, (1, tokens, width))

    def _check_sides(self, height: int, width: int) -> None:
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ValueError(
                f"height and width of the images must be multiples of the patch, {self.patch}; "
                f"got {height} x {width}"
            )
