"""Zeros after the end of axes, and taking them off."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.sizes import round_up


def padded(x: Array, *multiples: int) -> Array:
    """x with zeros after it, so that each axis is a multiple of the number given for it."""
    widths = [
        (0, round_up(size, multiple) - size)
        for size, multiple in zip(x.shape, multiples, strict=True)
    ]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def cut(x: Array, *sizes: int) -> Array:
    """The first `sizes` elements of x's last axes."""
    return x[(..., *(slice(size) for size in sizes))]


def resized(x: Array, shape: tuple[int, ...]) -> Array:
    """x, cut or with zeros after it, so that it has this shape."""
    x = x[tuple(slice(size) for size in shape)]
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])
