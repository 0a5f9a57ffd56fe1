"""Floating-point operations of training, without building the model."""

from typing import NamedTuple

from e88_jax.config import LMConfig
from e88_jax.sizing.memory import state_per_layer
from e88_jax.sizing.parameters import count_params

_RECURRENCE_FORWARD, _RECURRENCE_BACKWARD = 8, 18
"""Operations for each element of the state and step, a multiply-add being two: the read S^T k (2),
decay * S + k d^T (3), tanh (1), the output S^T q (2); backward the outer product q d_out^T (2), the
sums d_q (2), d_k (4), d_decay (2) and d_v (2), (1 - S^2) * dS (3), and the gradient of the state
before (3). What is computed once more in the backward pass is not counted."""


class Flops(NamedTuple):
    """Of one token."""

    products: int
    """Matrix products."""
    recurrence: int


def training_flops(config: LMConfig) -> Flops:
    """Operations of one token's forward and backward pass.

    Of the matrix products 6 for each weight: 2 forward, 4 backward (https://arxiv.org/abs/2001.08361,
    section 2.1). Every parameter counts as a weight of a product: the embedding is one as the
    transposed logits' weights, and all others but one in a thousand are.

    Raises:
        TypeError: no LMConfig.
    """
    per_element = _RECURRENCE_FORWARD + _RECURRENCE_BACKWARD
    return Flops(
        products=6 * count_params(config),
        recurrence=per_element * config.depth * state_per_layer(config.layer),
    )
