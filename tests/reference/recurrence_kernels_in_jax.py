"""The recurrence's kernels in plain JAX: what surrounds the kernels is tested with these.

They read the kernels' operands, padding included, and follow the formulas one step at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.common.padding import resized
from pallas_kernels.limits import SAVED_STATE_GROUP
from pallas_kernels.recurrence.backward_kernel import Gradients
from pallas_kernels.recurrence.forward_kernel import Saved
from pallas_kernels.recurrence.operands import Operands
from pallas_kernels.recurrence.tuning_config import PaddedSizes, TuningConfig

Steps = tuple[Array, ...]


def _rows(x: Array, time: int, heads: int, columns: int) -> Array:
    """x in float32, time first, padded as copies are by the GPU."""
    assert x.shape[3] * x.dtype.itemsize % 16 == 0
    x = resized(x, (x.shape[0], time, heads, columns))
    return jnp.moveaxis(x, 1, 0).astype(jnp.float32)


def _steps(x: Operands, sizes: PaddedSizes) -> Steps:
    """q, k, v (or delta) and scalars of the steps that count, float32, time first."""
    heads, values, keys = sizes
    q, k = (_rows(a, x.time, heads, keys) for a in (x.q, x.k))
    v = _rows(x.v, x.time, heads, values)
    assert x.scalars.shape[1:3] == (heads, 1 + x.has_write_gate + x.has_keep + x.has_live)
    assert x.scalars.shape[3] % 4 == 0
    return q, k, v, jnp.moveaxis(x.scalars, 3, 0)[: x.time]


def _read(x: Operands, state: Array, k: Array, scalars: Array) -> Array:
    """S^T k, zero where a document starts, `[B, H, V]`."""
    read = jnp.sum(state * k[:, :, None], axis=3)
    return read * scalars[:, :, 1 + x.has_write_gate, None] if x.has_keep else read


def _after(
    x: Operands, linear_state: bool, state: Array, k: Array, scalars: Array, delta: Array
) -> Array:
    """The state after a step, given its delta."""
    correction = delta * scalars[:, :, 1, None] if x.has_write_gate else delta
    after = scalars[:, :, 0, None, None] * state + correction[..., None] * k[:, :, None]
    after = after if linear_state else jnp.tanh(after)
    return jnp.where(scalars[:, :, -1, None, None] > 0, after, state) if x.has_live else after


def _run(x: Operands, linear_state: bool, state: Array, steps: Steps) -> tuple[Array, Steps]:
    """From the state `[B, H, V, N]` and steps to the state after them, and each step's out and
    delta, `[T, B, H, V]`."""

    def step(state: Array, at: Steps) -> tuple[Array, Steps]:
        q, k, v, scalars = at
        delta = v - _read(x, state, k, scalars)
        state = _after(x, linear_state, state, k, scalars, delta)
        return state, (jnp.sum(state * q[:, :, None], axis=3), delta)

    return lax.scan(step, state, steps)


def _values(x: Operands, linear_state: bool, state: Array, steps: Steps) -> Array:
    """v of the steps, which have delta in its place."""

    def step(state: Array, at: Steps) -> tuple[Array, Array]:
        _, k, delta, scalars = at
        v = delta + _read(x, state, k, scalars)
        return _after(x, linear_state, state, k, scalars, delta), v

    return lax.scan(step, state, steps)[1]


def _pieces(steps: Steps, length: int) -> tuple[Steps, Steps]:
    """Steps in whole pieces, `[pieces, length, ...]`, and those left over."""
    whole = steps[0].shape[0] // length * length
    return (
        tuple(a[:whole].reshape(-1, length, *a.shape[1:]) for a in steps),
        tuple(a[whole:] for a in steps),
    )


def forward(
    x: Operands,
    initial_state: Array | None,
    config: TuningConfig,
    saved_state_interval: int | None,
    save_delta: bool,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Saved | None]:
    batch, _, heads, n_state = x.q.shape
    sizes = config.padded(heads, x.v.shape[-1], n_state)
    state = initial_state
    if state is None:
        state = jnp.zeros((batch, *sizes), jnp.float32)

    def piece(state: Array, steps: Steps) -> tuple[Array, Any]:
        after, results = _run(x, linear_state, state, steps)
        return after, (results, state.astype(x.v.dtype))

    whole, rest = _pieces(_steps(x, sizes), saved_state_interval or x.time)
    state, (results, saved_states) = lax.scan(piece, state, whole)
    results = [a.reshape(-1, *a.shape[2:]) for a in results]
    if len(rest[0]):
        state, (last, saved_state) = piece(state, rest)
        results = [jnp.concatenate(parts) for parts in zip(results, last, strict=True)]
        saved_states = jnp.concatenate([saved_states, saved_state[None]])
    out, delta = (jnp.moveaxis(a, 0, 1) for a in results)
    saved = None
    if saved_state_interval is not None:
        saved = Saved(jnp.moveaxis(saved_states, 0, 2), delta if save_delta else None)
    return out.astype(x.v.dtype), state, saved


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    saved_states: Array,
    config: TuningConfig,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    heads, values, keys = sizes = config.padded(x.q.shape[2], d_out.shape[-1], x.q.shape[3])
    assert saved_states.shape[2] == -(-x.time // SAVED_STATE_GROUP)
    assert x.v.dtype == jnp.float32  # delta
    assert saved_states.dtype == d_out.dtype == x.q.dtype

    def piece(d_state: Array, at: Any) -> tuple[Array, Steps]:
        state, d_out, (q, k, delta, scalars) = at
        v = _values(x, linear_state, state, (q, k, delta, scalars))
        run = functools.partial(_run, x, linear_state)
        _, pullback = jax.vjp(run, state, (q, k, v, scalars))
        return pullback((d_state, (d_out, jnp.zeros_like(delta))))

    states = jnp.moveaxis(saved_states, 2, 0).astype(jnp.float32)[..., :values, :keys]
    d_outs = _rows(d_out, x.time, heads, values)
    (d_whole, *whole), (d_rest, *rest) = _pieces((d_outs, *_steps(x, sizes)), SAVED_STATE_GROUP)
    d_state, last = d_final_state, None
    if len(d_rest):
        d_state, last = piece(d_state, (states[-1], d_rest, tuple(rest)))
    pieces = states[: len(d_whole)], d_whole, tuple(whole)
    d_state, d_steps = lax.scan(piece, d_state, pieces, reverse=True)
    d_steps = [d.reshape(-1, *d.shape[2:]) for d in d_steps]
    if last is not None:
        d_steps = [jnp.concatenate(parts) for parts in zip(d_steps, last, strict=True)]
    d_q, d_k, d_v = (jnp.moveaxis(d, 0, 1) for d in d_steps[:3])
    # Two split-V partial sums, as from two blocks of columns.
    d_scalars = jnp.moveaxis(d_steps[3], 0, 3)[:, :, : 1 + x.has_write_gate]
    d_q, d_k, d_scalars = (jnp.stack([d / 4, 3 * d / 4]) for d in (d_q, d_k, d_scalars))
    d_q, d_k = (d.astype(x.q.dtype) for d in (d_q, d_k))
    return Gradients(d_q, d_k, d_v.astype(x.q.dtype), d_scalars, d_state)
