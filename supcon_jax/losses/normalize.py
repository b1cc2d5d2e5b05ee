"""Features of length 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "*axes dim"], epsilon: float = 1e-12) -> Float[Array, "*axes dim"]:
    """x / max(|x|, sqrt(epsilon)) along the last axis; the gradient is finite at x = 0.

    Args:
      x: any shape, entries up to 1e37; 16-bit input is normalised in float32 and returned in its
        own type.
      epsilon: smallest squared length divided by.

    Returns:
      The shape and type of `x`, of length 1 along the last axis.

    Raises:
      ValueError: x is not floating point.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The squares of huge entries overflow; the result does not depend on the size divided by first.
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(wide)), axis=-1, keepdims=True, initial=1)
    wide = wide / size
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squared, epsilon / size / size))).astype(x.dtype)
