"""The whole training step of one layer, to be timed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from e88_jax.config import LMConfig
from e88_jax.model import Block
from e88_jax.optim import weight_decay_mask
from e88_jax.xla import xla_options

LEARNING_RATE = 1e-4
"""Small enough that a timing's hundreds of steps hardly change the layer."""


def make_layer_step(
    config: LMConfig, batch: int, seq_len: int
) -> tuple[Callable[[Any, Array], tuple[Any, Array]], Any, Array]:
    """Training step of the model's first layer: the mean square of its output, gradient and AdamW
    update, compiled by jit.

    Parameters and optimizer state are float32.

    Returns:
        `(step, state, x)`: `step(state, x)` gives the next state and the loss, and consumes its
        state (parameters and optimizer); x is normal, `[batch, seq_len, dim]` float32.
    """
    graphdef, params = nnx.split(Block(config, config.mixers[0], rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(LEARNING_RATE, mask=weight_decay_mask)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=xla_options())
    def step(state: Any, x: Array) -> tuple[Any, Array]:
        params, opt_state = state

        def loss_of(params: Any) -> Array:
            y, _ = nnx.merge(graphdef, params)(x, None, None, None)
            return jnp.mean(jnp.square(y))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    x = jax.random.normal(jax.random.key(1), (batch, seq_len, config.dim))
    return step, (params, optimizer.init(params)), x
