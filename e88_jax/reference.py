"""The recurrence in plain JAX: the definition that every other implementation is held to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from e88_jax.precision import wide_dtype


class _Inputs(NamedTuple):
    """What one step reads; with a leading time axis, what a run of steps reads."""

    q: Array  # [B, H, N]
    k: Array  # [B, H, N]
    v: Array  # [B, H, V]
    decay: Array  # [B, H]
    write_gate: Array | None  # [B, H]
    restart: Array | None  # [B] bool: this step starts a document


def _step(state: Array, x: _Inputs, *, linear_state: bool) -> tuple[Array, Array]:
    if x.restart is not None:
        state = jnp.where(x.restart[:, None, None, None], jnp.zeros_like(state), state)
    wide = state.dtype
    q, k, v = x.q.astype(wide), x.k.astype(wide), x.v.astype(wide)
    read = jnp.einsum("bhnv,bhn->bhv", state, k, precision=lax.Precision.HIGHEST)
    correction = v - read
    if x.write_gate is not None:
        correction = x.write_gate[..., None].astype(wide) * correction
    write = k[..., :, None] * correction[..., None, :]
    state = x.decay[..., None, None].astype(wide) * state + write
    if not linear_state:
        state = jnp.tanh(state)
    out = jnp.einsum("bhnv,bhn->bhv", state, q, precision=lax.Precision.HIGHEST)
    return state, out.astype(x.v.dtype)


def scan_recurrence(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    *,
    linear_state: bool,
    checkpoint_every: int,
) -> tuple[Array, Array]:
    """`e88_recurrence` by `lax.scan`; arguments as there, already checked."""
    batch, time, heads, n_state = q.shape
    wide = wide_dtype(q.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, n_state, v.shape[-1]), wide)
    restart = None
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        restart = jnp.pad(changes, ((0, 0), (1, 0)))
    steps = _Inputs(q, k, v, decay, write_gate, restart)
    steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps)

    @jax.checkpoint
    def chunk(state: Array, steps: _Inputs) -> tuple[Array, Array]:
        return lax.scan(lambda s, x: _step(s, x, linear_state=linear_state), state, steps)

    n_chunks = time // checkpoint_every
    whole = n_chunks * checkpoint_every
    chunks = jax.tree.map(
        lambda x: x[:whole].reshape(n_chunks, checkpoint_every, *x.shape[1:]), steps
    )
    state, out = lax.scan(chunk, initial_state.astype(wide), chunks)
    out = out.reshape(whole, *out.shape[2:])
    if whole < time:
        state, rest = chunk(state, jax.tree.map(lambda x: x[whole:], steps))
        out = jnp.concatenate([out, rest])
    return jnp.moveaxis(out, 0, 1), state
