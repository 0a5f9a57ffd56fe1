"""The kernels' functions in plain JAX: what surrounds the kernels can be tested without them.

They read the kernels' operands, padding and all, and follow the formulas one step at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backward import Gradients
from pallas_kernels.geometry import Geometry
from pallas_kernels.operands import Operands

Steps = tuple[Array, ...]


def _steps(x: Operands) -> Steps:
    """q, k, v and scalars of the steps that count, float32, time first."""
    by_time = [jnp.moveaxis(a, 1, 0).astype(jnp.float32)[: x.time] for a in (x.q, x.k, x.v)]
    return *by_time, jnp.moveaxis(x.scalars, 3, 0)[: x.time]


def _check(x: Operands, geometry: Geometry) -> None:
    batch, steps, heads, keys = x.q.shape
    assert heads % geometry.heads == 0
    assert x.v.shape[-1] % geometry.values == 0
    assert keys % 8 == 0
    assert steps == max(x.time, geometry.chunk)
    assert x.scalars.shape[:3] == (batch, heads, 1 + x.has_write_gate + x.has_keep)
    assert x.scalars.shape[3] % 4 == 0


def _run(x: Operands, linear_state: bool, state: Array, steps: Steps) -> tuple[Array, Array]:
    """From the state `[B, H, V, N]` and steps to the state after them and out `[T, B, H, V]`."""

    def step(state: Array, at: Steps) -> tuple[Array, Array]:
        q, k, v, scalars = at
        read = jnp.sum(state * k[:, :, None], axis=3)
        if x.has_keep:
            read = read * scalars[:, :, -1, None]
        correction = v - read
        if x.has_write_gate:
            correction = correction * scalars[:, :, 1, None]
        state = scalars[:, :, 0, None, None] * state + correction[..., None] * k[:, :, None]
        state = state if linear_state else jnp.tanh(state)
        return state, jnp.sum(state * q[:, :, None], axis=3)

    return lax.scan(step, state, steps)


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
    geometry: Geometry,
    checkpoint_every: int | None,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Array | None]:
    _check(x, geometry)
    batch, _, heads, keys = x.q.shape
    state = initial_state
    if state is None:
        state = jnp.zeros((batch, heads, x.v.shape[-1], keys), jnp.float32)

    def piece(state: Array, steps: Steps) -> tuple[Array, tuple[Array, Array]]:
        after, out = _run(x, linear_state, state, steps)
        return after, (out, state.astype(x.v.dtype))

    whole, rest = _pieces(_steps(x), checkpoint_every or x.time)
    state, (out, checkpoints) = lax.scan(piece, state, whole)
    out = out.reshape(-1, *out.shape[2:])
    if len(rest[0]):
        state, (last, checkpoint) = piece(state, rest)
        out = jnp.concatenate([out, last])
        checkpoints = jnp.concatenate([checkpoints, checkpoint[None]])
    checkpoints = None if checkpoint_every is None else jnp.moveaxis(checkpoints, 0, 2)
    return jnp.moveaxis(out, 0, 1).astype(x.v.dtype), state, checkpoints


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    checkpoints: Array,
    geometry: Geometry,
    checkpoint_every: int,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    _check(x, geometry)
    assert checkpoints.shape[2] == -(-x.time // checkpoint_every)

    def piece(d_state: Array, at: Any) -> tuple[Array, Steps]:
        state, d_out, steps = at
        _, pullback = jax.vjp(lambda *a: _run(x, linear_state, *a), state, steps)
        return pullback((d_state, d_out))

    states = jnp.moveaxis(checkpoints, 2, 0).astype(jnp.float32)
    d_outs = jnp.moveaxis(d_out, 1, 0).astype(jnp.float32)[: x.time]
    (d_whole, *whole), (d_rest, *rest) = _pieces((d_outs, *_steps(x)), checkpoint_every)
    d_state, last = d_final_state, None
    if len(d_rest):
        d_state, last = piece(d_state, (states[-1], d_rest, tuple(rest)))
    pieces = states[: len(d_whole)], d_whole, tuple(whole)
    d_state, d_steps = lax.scan(piece, d_state, pieces, reverse=True)
    d_steps = [d.reshape(-1, *d.shape[2:]) for d in d_steps]
    if last is not None:
        d_steps = [jnp.concatenate(parts) for parts in zip(d_steps, last, strict=True)]
    d_q, d_k, d_v = (jnp.moveaxis(d, 0, 1) for d in d_steps[:3])
    # Two partial sums, as blocks of columns give; of padding, whatever is in memory.
    d_scalars = jnp.moveaxis(d_steps[3], 0, 3)[:, :, : 1 + x.has_write_gate]
    d_q, d_k, d_scalars = (jnp.stack([d / 4, 3 * d / 4]) for d in (d_q, d_k, d_scalars))
    return Gradients(d_q, d_k, d_v.astype(x.v.dtype), d_scalars, d_state)
