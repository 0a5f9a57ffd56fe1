"""What queries, keys and values go through before the recurrence: SiLU and unit length."""

import jax
import jax.numpy as jnp
from jax import Array

from e88_jax.precision import wide

LENGTH_EPSILON = 1e-6
"""Added to the length that a row is divided by, as in the original implementation."""


def l2_normalize(x: Array) -> Array:
    """`x / (||x|| + 1e-6)` over the last axis, in float32 (float64 for float64), in x's dtype.

    A row of zeros gives zeros and a finite gradient.
    """
    x_wide = wide(x)
    square = jnp.sum(x_wide * x_wide, axis=-1, keepdims=True)
    is_zero = square == 0  # the square root has no finite gradient there
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    return (x_wide / (norm + LENGTH_EPSILON)).astype(x.dtype)


def activate(x: Array, silu: bool, unit_length: bool) -> Array:
    """SiLU, then unit length over the last axis, where asked for, in x's dtype.

    In between it is float32 (float64 for float64): with nothing rounded there, XLA reads x twice
    rather than write what is between.
    """
    y = wide(x)
    if silu:
        y = jax.nn.silu(y)
    if unit_length:
        y = l2_normalize(y)
    return y.astype(x.dtype)
