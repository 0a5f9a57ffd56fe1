"""The matrix products between the recurrences."""

from typing import Any

from flax import nnx
from jax import Array


class Projection(nnx.Linear):
    """`nnx.Linear` over the last axis, which computes as a product of two plain matrices.

    The gradient of a kernel from `[B, T, dim]` inputs makes XLA's CPU compiler copy the activations
    into other layouts and takes three times as long; from `[B * T, dim]` it is one product.
    """

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        y = super().__call__(inputs.reshape(-1, inputs.shape[-1]), *args, **kwargs)
        return y.reshape(*inputs.shape[:-1], y.shape[-1])
