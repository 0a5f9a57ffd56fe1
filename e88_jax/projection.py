"""The matrix products between the recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from e88_jax.precision import wide


def multiply(x: Array, kernel: Array) -> Array:
    """`x @ kernel` over the last axis, as a product of two plain matrices.

    The gradient of a kernel from `[B, T, dim]` inputs makes XLA's CPU compiler copy the activations
    into other layouts and takes three times as long; from `[B * T, dim]` it is one product.
    """
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def multiply_transposed(x: Array, kernel: Array) -> Array:
    """`x @ kernel.T` over the last axis, for inference on a GPU.

    One row is multiplied as the sum that it is: XLA reads a kernel `[n_out, n_in]` in one pass
    then, at the speed of memory, which its matrix products of few rows do not reach.
    """
    if x.size != x.shape[-1]:
        return multiply(x, kernel.T)
    y = jnp.sum(wide(kernel) * wide(x.reshape(1, -1)), axis=1)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


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
        self.transposed = False
        self.kernel = nnx.Param(kernel_init(rngs.params(), (n_in, n_out), jnp.float32))

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return multiply_transposed(x, kernel) if self.transposed else multiply(x, kernel)

    def prepare_for_inference(self) -> None:
        """Keeps the kernel in the dtype of the product, and on a GPU as `[n_out, n_in]`.

        On a CPU a product of several rows takes longer so.
        """
        kernel = self.kernel[...].astype(self.dtype)
        if jax.default_backend() == "gpu" and not self.transposed:
            kernel, self.transposed = kernel.T, True
        self.kernel = nnx.Param(kernel)
