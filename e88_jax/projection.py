"""The matrix products between the recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

GPU_ROWS = 8
"""Fewest rows of a product on a GPU, of a kernel of at most `ALONE` numbers."""
ALONE = 10_000_000
"""Most numbers of a kernel of which XLA makes, for one row on a GPU, a multiplication that is
written to memory and then summed."""


def multiply(x: Array, kernel: Array) -> Array:
    """`x @ kernel` over the last axis, as a product of two plain matrices.

    The gradient of a kernel from `[B, T, dim]` inputs makes XLA's CPU compiler copy the activations
    into other layouts and takes three times as long; from `[B * T, dim]` it is one product.
    """
    rows = x.reshape(-1, x.shape[-1])
    n_rows = rows.shape[0]
    if n_rows == 1 and kernel.size <= ALONE and jax.default_backend() == "gpu":
        rows = jnp.broadcast_to(rows, (GPU_ROWS, rows.shape[1]))
    return (rows @ kernel)[:n_rows].reshape(*x.shape[:-1], kernel.shape[-1])


class Projection(nnx.Module):
    """A linear layer without a bias, over the last axis.

    Args:
        n_in, n_out: sizes of that axis before and after.
        dtype: of the product; the kernel `[n_in, n_out]` is float32.
    """

    def __init__(
        self, n_in: int, n_out: int, *, dtype: DTypeLike, kernel_init: Initializer, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (n_in, n_out), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return multiply(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
