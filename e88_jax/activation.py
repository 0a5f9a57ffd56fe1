"""What queries, keys and values go through before the recurrence: SiLU and unit length."""

import jax
import jax.numpy as jnp
from jax import Array

from e88_jax import recurrence
from e88_jax.precision import wide
from e88_jax.recurrence import Implementation


def l2_normalize(x: Array) -> Array:
    """`x / (||x|| + 1e-6)` over the last axis, in float32 (float64 for float64), in x's dtype.

    A row of zeros gives zeros and a finite gradient.
    """
    x_wide = wide(x)
    square = jnp.sum(x_wide * x_wide, axis=-1, keepdims=True)
    is_zero = square == 0  # the square root has no finite gradient there
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    return (x_wide / (norm + 1e-6)).astype(x.dtype)


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


def activate_product(
    y: Array,
    n_heads: int,
    n_state: int,
    n_value: int,
    *,
    silu: bool,
    unit_length: bool,
    implementation: Implementation | None,
) -> tuple[Array, Array, Array, Array] | None:
    """`activate` for q, k and v side by side, by a kernel that reads them once; None where there is
    none for this device or these sizes, or `implementation` is "scan".

    Args:
        y: `[B, T, columns]`: q and k of all heads, v of all, and whatever else.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]` and the columns after theirs, in y's dtype.
    """
    if implementation == "scan" or recurrence.unsupported_device() is not None:
        return None
    from pallas_kernels import activation  # not every platform's jaxlib has what it imports

    split = activation.Split(n_heads, n_state, n_value, silu, unit_length)
    if split.unsupported(y.shape[-1], y.dtype) is not None:
        return None
    return activation.activate(split, y)
