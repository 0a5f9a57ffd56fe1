"""SiLU and unit length of queries, keys and values, before the recurrence."""

import jax
import jax.numpy as jnp
from jax import Array

from e88_jax import kernels
from e88_jax.config import E88Config
from e88_jax.mixers.base import Implementation
from e88_jax.precision import wide

LENGTH_EPSILON = 1e-6
"""Summand to the length that divides a row, as in the original implementation."""


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

    The intermediate is float32 (float64 for float64): without rounding in between, XLA reads x
    twice instead of writing the intermediate.
    """
    y = wide(x)
    if silu:
        y = jax.nn.silu(y)
    if unit_length:
        y = l2_normalize(y)
    return y.astype(x.dtype)


def activate_qkv(
    config: E88Config, y: Array, n_rest: int, implementation: Implementation | None
) -> tuple[Array, Array, Array, Array]:
    """SiLU and unit length of q, k and v in a matmul's output, by a kernel if it takes the call.

    Args:
        config: sizes and options of the layer.
        y: `[B, T, columns]`: q, k and, unless tied, v of each head, `[H, 2N + V]`, then others.
        n_rest: count of the others; padding may follow.
        implementation: implementation of the recurrence; "scan" stands for XLA.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]`, and the other columns, perhaps with padding, in
        y's dtype.
    """
    try:
        return _by_kernel(config, y, n_rest, implementation)
    except NotImplementedError as refusal:
        kernels.log_fallback("SiLU and unit length of q, k and v", refusal)
        return _by_xla(config, y)


def _by_kernel(
    config: E88Config, y: Array, n_rest: int, implementation: Implementation | None
) -> tuple[Array, Array, Array, Array]:
    kernels.require(implementation)
    if config.tie_kv:
        raise kernels.NotWorthIt("takes no tied keys and values")
    if y.shape[1] == 1:
        raise kernels.NotWorthIt("is too much for single tokens")
    from pallas_kernels.qkv_activation import activate as by_kernel

    return kernels.call(by_kernel, kernels.head_columns(config), y, n_rest)


def _by_xla(config: E88Config, y: Array) -> tuple[Array, Array, Array, Array]:
    heads, n_state = config.n_heads, config.n_state
    end = heads * config.head_columns
    streams = y[:, :, :end].reshape(*y.shape[:2], heads, config.head_columns)
    q, k = (streams[..., i * n_state : (i + 1) * n_state] for i in range(2))
    v = k if config.tie_kv else streams[..., 2 * n_state :]
    silu, unit_length = config.use_silu, config.use_l2_norm
    q, k, v = (
        activate(x, silu, unit) for x, unit in ((q, unit_length), (k, unit_length), (v, False))
    )
    return q, k, v, y[:, :, end:]
