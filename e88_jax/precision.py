"""The precision policy: which dtype each kind of arithmetic runs in.

Parameters are float32. Matmuls run in `compute_dtype`. The state, sums over it, norms,
decay, gates, softmax and loss run in `wide`: float32, or float64 where the inputs are.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels import target

NORM_EPSILON = 1e-5
"""Epsilon of every RMS norm in the layers and the model, as in the original implementation."""


def compute_dtype(configured: str | None) -> jnp.dtype:
    """The dtype of matmuls: as configured, else bfloat16 on a GPU and float32 elsewhere."""
    if configured is not None:
        return jnp.dtype(configured)
    return jnp.dtype(jnp.bfloat16 if target.current().platform == "gpu" else jnp.float32)


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, float32 for anything narrower."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def wide(x: Array) -> Array:
    """x in `wide_dtype`."""
    return x.astype(wide_dtype(x.dtype))
