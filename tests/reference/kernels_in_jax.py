"""The kernels' functions in plain JAX: what surrounds the kernels can be tested without them.

They read the kernels' operands, padding and all, and follow the formulas one step at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backward import Gradients
from pallas_kernels.forward import Kept
from pallas_kernels.geometry import GROUP, Geometry, Sizes
from pallas_kernels.operands import Operands, resized

Steps = tuple[Array, ...]


def _rows(x: Array, time: int, heads: int, columns: int) -> Array:
    """x in float32, time first, padded as copies are by the GPU."""
    assert x.shape[3] * x.dtype.itemsize % 16 == 0
    x = resized(x, (x.shape[0], time, heads, columns))
    return jnp.moveaxis(x, 1, 0).astype(jnp.float32)


def _steps(x: Operands, sizes: Sizes) -> Steps:
    """q, k, v (or errors) and scalars of the steps that count, float32, time first."""
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
    x: Operands, linear_state: bool, state: Array, k: Array, scalars: Array, error: Array
) -> Array:
    """The state after a step, given the error that it corrects."""
    correction = error * scalars[:, :, 1, None] if x.has_write_gate else error
    after = scalars[:, :, 0, None, None] * state + correction[..., None] * k[:, :, None]
    after = after if linear_state else jnp.tanh(after)
    return jnp.where(scalars[:, :, -1, None, None] > 0, after, state) if x.has_live else after


def _run(x: Operands, linear_state: bool, state: Array, steps: Steps) -> tuple[Array, Steps]:
    """From the state `[B, H, V, N]` and steps to the state after them, and each step's out and
    error, `[T, B, H, V]`."""

    def step(state: Array, at: Steps) -> tuple[Array, Steps]:
        q, k, v, scalars = at
        error = v - _read(x, state, k, scalars)
        state = _after(x, linear_state, state, k, scalars, error)
        return state, (jnp.sum(state * q[:, :, None], axis=3), error)

    return lax.scan(step, state, steps)


def _values(x: Operands, linear_state: bool, state: Array, steps: Steps) -> Array:
    """v of the steps, which have errors in its place."""

    def step(state: Array, at: Steps) -> tuple[Array, Array]:
        _, k, error, scalars = at
        v = error + _read(x, state, k, scalars)
        return _after(x, linear_state, state, k, scalars, error), v

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
    geometry: Geometry,
    saved_state_interval: int | None,
    keep_errors: bool,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Kept | None]:
    batch, _, heads, n_state = x.q.shape
    sizes = geometry.padded(heads, x.v.shape[-1], n_state)
    state = initial_state
    if state is None:
        state = jnp.zeros((batch, *sizes), jnp.float32)

    def piece(state: Array, steps: Steps) -> tuple[Array, Any]:
        after, results = _run(x, linear_state, state, steps)
        return after, (results, state.astype(x.v.dtype))

    whole, rest = _pieces(_steps(x, sizes), saved_state_interval or x.time)
    state, (results, checkpoints) = lax.scan(piece, state, whole)
    results = [a.reshape(-1, *a.shape[2:]) for a in results]
    if len(rest[0]):
        state, (last, checkpoint) = piece(state, rest)
        results = [jnp.concatenate(parts) for parts in zip(results, last, strict=True)]
        checkpoints = jnp.concatenate([checkpoints, checkpoint[None]])
    out, errors = (jnp.moveaxis(a, 0, 1) for a in results)
    kept = None
    if saved_state_interval is not None:
        kept = Kept(jnp.moveaxis(checkpoints, 0, 2), errors if keep_errors else None)
    return out.astype(x.v.dtype), state, kept


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    checkpoints: Array,
    geometry: Geometry,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    heads, values, keys = sizes = geometry.padded(x.q.shape[2], d_out.shape[-1], x.q.shape[3])
    assert checkpoints.shape[2] == -(-x.time // GROUP)
    assert x.v.dtype == jnp.float32  # the errors
    assert checkpoints.dtype == d_out.dtype == x.q.dtype

    def piece(d_state: Array, at: Any) -> tuple[Array, Steps]:
        state, d_out, (q, k, errors, scalars) = at
        v = _values(x, linear_state, state, (q, k, errors, scalars))
        run = functools.partial(_run, x, linear_state)
        _, pullback = jax.vjp(run, state, (q, k, v, scalars))
        return pullback((d_state, (d_out, jnp.zeros_like(errors))))

    states = jnp.moveaxis(checkpoints, 2, 0).astype(jnp.float32)[..., :values, :keys]
    d_outs = _rows(d_out, x.time, heads, values)
    (d_whole, *whole), (d_rest, *rest) = _pieces((d_outs, *_steps(x, sizes)), GROUP)
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
    d_q, d_k = (d.astype(x.q.dtype) for d in (d_q, d_k))
    return Gradients(d_q, d_k, d_v.astype(x.q.dtype), d_scalars, d_state)
