"""The decay of a head's state from one step to the next."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from e88_jax.config import E88Config
from e88_jax.meshes import named_axes
from e88_jax.precision import wide


def init_a_log(key: Array, n_heads: int, lowest: float = 1.0) -> Array:
    """Logarithms of rates uniform in [lowest, 16], as in Mamba2, from 1 (`docs/references.md`)."""
    return jnp.log(jax.random.uniform(key, (n_heads,), jnp.float32, lowest, 16.0))


def init_dt_bias(key: Array, n_heads: int) -> Array:
    """The softplus inverse of steps log-uniform in [1e-3, 1e-1], floored at 1e-4, as in Mamba
    (`docs/references.md`)."""
    low, high = jnp.log(jnp.float32(1e-3)), jnp.log(jnp.float32(1e-1))
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, (n_heads,), jnp.float32, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


class StepAndRate(nnx.Module):
    """Mamba's parts of a decay of each head: the step `softplus(a + dt_bias)`, from the input's
    part `a`, and the rate `-exp(A_log)`. The decay is `exp(step * rate)`.

    Args:
        n_heads: heads.
        lowest: lowest initial rate, of heads whose rates are uniform from there to 16.
        rngs: source of the initial values.
    """

    def __init__(self, n_heads: int, lowest: float = 1.0, *, rngs: nnx.Rngs):
        self.A_log = nnx.Param(init_a_log(rngs.params(), n_heads, lowest), **named_axes("heads"))
        self.dt_bias = nnx.Param(init_dt_bias(rngs.params(), n_heads), **named_axes("heads"))

    def step(self, a: Array) -> Array:
        """`[B, T, H]`, float32 or float64, of a `[B, T, H]`."""
        a = wide(a)
        return jax.nn.softplus(a + self.dt_bias[None, None].astype(a.dtype))

    def rate(self, dtype: jnp.dtype) -> Array:
        """`[H]`, at most 0."""
        return -jnp.exp(self.A_log[...].astype(dtype))


class Decay(StepAndRate):
    """The decay of each head and step, in (0, 1], by `config.decay_mode` and the input's part `a`:

    mamba       exp(-exp(A_log) * softplus(a + dt_bias))
    simple      sigmoid(a)
    constant    sigmoid(logit), logit initially 4
    none        1
    """

    def __init__(self, config: E88Config, *, rngs: nnx.Rngs):
        heads = config.n_heads
        self.mode, self.n_heads = config.decay_mode, heads
        if config.decay_mode == "mamba":
            super().__init__(heads, rngs=rngs)
        elif config.decay_mode == "constant":
            logit = jnp.full((heads,), 4.0, jnp.float32)
            self.logit = nnx.Param(logit, **named_axes("heads"))

    def __call__(self, a: Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """`[B, T, H]` in dtype.

        Args:
            a: `[B, T, H]`, or None in the modes that read nothing.
            shape: `(B, T)`.
            dtype: float32, or float64.
        """
        match self.mode:
            case "constant":
                decay = jax.nn.sigmoid(self.logit[None, None].astype(dtype))
                return jnp.broadcast_to(decay, (*shape, self.n_heads))
            case "none":
                return jnp.ones((*shape, self.n_heads), dtype)
            case _:
                assert a is not None
        if self.mode == "simple":
            return jax.nn.sigmoid(wide(a))
        return jnp.exp(self.rate(dtype)[None, None] * self.step(a))
