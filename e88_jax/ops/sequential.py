"""Linear recurrences of a matrix state by `lax.scan`: the definition of `ops/chunked.py`."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from e88_jax.meshes import varying_alike
from e88_jax.precision import wide_dtype
from e88_jax.reference import scan_steps
from e88_jax.typed import einsum


class Inputs(NamedTuple):
    """Inputs of one step, for G heads of q and k and H = G * R of v."""

    q: Array  # [B, G, K]
    k: Array  # [B, G, K]
    v: Array  # [B, H, V]
    log_decay: Array  # [B, H]
    write_gate: Array  # [B, H]
    starts: Array | None  # [B] bool: a document starts here, from a zero state


_einsum = functools.partial(einsum, precision=lax.Precision.HIGHEST)


def _step(delta_rule: bool, state: Array, x: Inputs) -> tuple[Array, Array]:
    """The state `[B, H, K, V]` after a step, and its output `[B, H, V]`."""
    if x.starts is not None:
        state = jnp.where(x.starts[:, None, None, None], jnp.zeros_like(state), state)
    repeats = state.shape[1] // x.k.shape[1]
    q, k = (jnp.repeat(y, repeats, axis=1) for y in (x.q, x.k))
    decayed = jnp.exp(x.log_decay)[..., None, None] * state
    delta = x.v - _einsum("bhkv,bhk->bhv", decayed, k) if delta_rule else x.v
    after = decayed + _einsum("bhk,bhv->bhkv", k, x.write_gate[..., None] * delta)
    return after, _einsum("bhkv,bhk->bhv", after, q)


def sequential(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
    starts: Array | None,
    *,
    delta_rule: bool,
    saved_state_interval: int = 32,
) -> tuple[Array, Array]:
    """A linear recurrence, step by step:

        u_t = write_gate_t (v_t - decay_t S_{t-1}^T k_t)     by the delta rule
        u_t = write_gate_t v_t                               without
        S_t = decay_t S_{t-1} + k_t u_t^T
        o_t = S_t^T q_t

    Args:
        q, k: `[B, T, G, K]`.
        v: `[B, T, H, V]`, H a multiple of G: head h has the q and k of head h // (H / G).
        log_decay, write_gate: `[B, T, H]`.
        initial_state: `[B, H, K, V]`; None is zeros.
        starts: `[B, T]` bool, steps that start from a zero state, or None.
        delta_rule: write the correction of v instead of v.
        saved_state_interval: steps between states that are saved for the backward pass.

    Returns:
        out `[B, T, H, V]` in v's dtype, and the state after the last step in float32, or float64.
    """
    wide = wide_dtype(q.dtype)
    state = initial_state
    if state is None:
        shape = (v.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
        state, q = varying_alike(jnp.zeros(shape, wide), q)
    inputs = Inputs(q, k, v, log_decay, write_gate, starts)
    step = functools.partial(_step, delta_rule)
    return scan_steps(step, state.astype(wide), inputs, v.dtype, saved_state_interval)
