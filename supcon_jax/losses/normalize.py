"""Features of length 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "*axes dim"], epsilon: float = 1e-12) -> Float[Array, "*axes dim"]:
    """x / max(|x|, sqrt(epsilon)) along the last axis; the gradient is finite at x = 0.

    Args:
      x: any shape; 16-bit input is normalised in float32 and returned in its own type.
      epsilon: smallest squared length divided by.

    Returns:
      The shape and type of `x`, of length 1 along the last axis.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squared, epsilon))).astype(x.dtype)
