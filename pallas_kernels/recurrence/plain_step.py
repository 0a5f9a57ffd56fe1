"""A single step of the recurrence in plain JAX: decoding, faster than the kernels' chunks."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.limits import require_supported


def single_step(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
    live: Array | None = None,
    *,
    linear_state: bool,
) -> tuple[Array, Array]:
    """The recurrence for T = 1, where no document can start; arguments as `recurrence` takes them.

    Raises:
        NotImplementedError: sizes or a dtype that the kernels do not take.
    """
    batch, _, heads, n_state = q.shape
    require_supported(n_state, v.shape[-1], q.dtype.name)
    # Elementwise, not einsum: float32 whatever the precision of matmuls.
    key, query = (x[:, 0, :, :, None].astype(jnp.float32) for x in (k, q))
    value = v[:, 0].astype(jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, n_state, v.shape[-1]), jnp.float32)
    correction = value - jnp.sum(initial_state * key, axis=2)
    if write_gate is not None:
        correction = write_gate[:, 0, :, None] * correction
    state = decay[:, 0, :, None, None] * initial_state + key * correction[:, :, None]
    state = state if linear_state else jnp.tanh(state)
    if live is not None:
        state = jnp.where(live[:, :, None, None], state, initial_state)
    return jnp.sum(state * query, axis=2)[:, None].astype(v.dtype), state
