"""The recurrence in plain JAX: the definition that every other implementation is held to.

`_update` and `_read` are one step and `_step_back` is its gradient. `_steps` writes out a few steps
in a row; `_in_pieces` runs any number of them piece by piece, keeping the states in between.

The gradients are `jax.custom_vjp`s made of ordinary operations: reverse mode works to any order,
forward mode (`jax.jvp`, `jax.jacfwd`) does not.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from e88_jax.precision import wide_dtype

MAX_WRITTEN_OUT = 8
"""Most steps written out in a row. Within them the backward pass has each step's state at hand,
where a loop would copy every one into a stack and out again; more make longer programs."""


class _Inputs(NamedTuple):
    """What one step reads; with a time axis after B, what a piece of time reads."""

    q: Array  # [B, H, N]
    k: Array  # [B, H, N]
    v: Array  # [B, H, V]
    decay: Array  # [B, H]
    write_gate: Array | None  # [B, H]


_Run = Callable[[Array, _Inputs, Array | None], tuple[Array, Array]]
"""`(state [B, H, N, V], inputs of L steps, restart [B, L]) -> (state, out [B, L, H, V])`."""

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _outer(x: Array, y: Array) -> Array:
    return x[..., :, None] * y[..., None, :]


def _correction(state: Array, x: _Inputs) -> tuple[Array, Array]:
    """How far v is from what the state holds at address k, without and with the write gate."""
    error = x.v - _einsum("bhnv,bhn->bhv", state, x.k)
    return error, error if x.write_gate is None else x.write_gate[..., None] * error


def _update(state: Array, x: _Inputs, linear_state: bool) -> Array:
    _, correction = _correction(state, x)
    state = x.decay[..., None, None] * state + _outer(x.k, correction)
    return state if linear_state else jnp.tanh(state)


def _read(state: Array, q: Array) -> Array:
    return _einsum("bhnv,bhn->bhv", state, q)


def _step_back(
    before: Array, after: Array, x: _Inputs, d_out: Array, d_after: Array, linear_state: bool
) -> tuple[Array, _Inputs]:
    """The gradients of the state before a step and of its inputs, from those of its results."""
    error, correction = _correction(before, x)
    d_after = d_after + _outer(x.q, d_out)
    d_sum = d_after if linear_state else d_after * (1 - after * after)  # inside the tanh
    d_correction = _einsum("bhnv,bhn->bhv", d_sum, x.k)
    if x.write_gate is None:
        d_v, d_gate = d_correction, None
    else:
        d_v = x.write_gate[..., None] * d_correction
        d_gate = jnp.sum(d_correction * error, axis=-1)
    d_k = _einsum("bhnv,bhv->bhn", d_sum, correction) - _einsum("bhnv,bhv->bhn", before, d_v)
    d_q = _einsum("bhnv,bhv->bhn", after, d_out)
    d_decay = jnp.sum(d_sum * before, axis=(-2, -1))
    d_before = x.decay[..., None, None] * d_sum - _outer(x.k, d_v)
    return d_before, _Inputs(d_q, d_k, d_v, d_decay, d_gate)


def _at_step(t: int, inputs: _Inputs, dtype: jnp.dtype) -> _Inputs:
    return jax.tree.map(lambda x: x[:, t].astype(dtype), inputs)


def _cleared(t: int, restart: Array | None, state: Array) -> Array:
    """The state, or zeros in the rows where step t starts a document."""
    if restart is None:
        return state
    return jnp.where(restart[:, t, None, None, None], jnp.zeros_like(state), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _steps(
    linear_state: bool, state: Array, inputs: _Inputs, restart: Array | None
) -> tuple[Array, Array]:
    """A `_Run` that writes all its steps out."""
    out = []
    for t in range(inputs.q.shape[1]):
        x = _at_step(t, inputs, state.dtype)
        state = _update(_cleared(t, restart, state), x, linear_state)
        out.append(_read(state, x.q))
    return state, jnp.stack(out, axis=1).astype(inputs.v.dtype)


def _steps_forward(linear_state, *args):
    return _steps(linear_state, *args), args


def _steps_backward(linear_state, residuals, d_results):
    state, inputs, restart = residuals
    d_state, d_out = d_results
    d_out = d_out.astype(state.dtype)
    xs = [_at_step(t, inputs, state.dtype) for t in range(inputs.q.shape[1])]
    before, after = [], []
    for t, x in enumerate(xs):
        before.append(_cleared(t, restart, state))
        state = _update(before[t], x, linear_state)
        after.append(state)
    d_xs = []
    for t, x in reversed(list(enumerate(xs))):
        d_state, d_x = _step_back(before[t], after[t], x, d_out[:, t], d_state, linear_state)
        d_state = _cleared(t, restart, d_state)
        d_xs.append(d_x)
    d_inputs = jax.tree.map(
        lambda x, *d_xs: jnp.stack(d_xs[::-1], axis=1).astype(x.dtype), inputs, *d_xs
    )
    return d_state, d_inputs, None


_steps.defvjp(_steps_forward, _steps_backward)


def _piece(start: Array | int, length: int, inputs: Any) -> Any:
    """`length` steps of arrays `[B, T, ...]`: a slice of each, where a transpose would copy all."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=1), inputs)


def _joined(pieces: Array) -> Array:
    """From `[pieces, B, L, ...]` to `[B, pieces * L, ...]`."""
    pieces = jnp.moveaxis(pieces, 0, 1)
    return pieces.reshape(pieces.shape[0], -1, *pieces.shape[3:])


def _run_equal_pieces(
    run: _Run, length: int, state: Array, inputs: _Inputs, restart: Array | None
) -> tuple[Array, Array]:
    """`run` on `length` steps at a time, of a whole multiple of them.

    The gradient keeps the state before each piece and runs the piece again.
    """
    return _in_equal_pieces_forward(run, length, state, inputs, restart)[0]


def _in_equal_pieces_forward(run, length, state, inputs, restart):
    def piece(state, start):
        after, out = run(state, *_piece(start, length, (inputs, restart)))
        return after, (out, state)

    starts = jnp.arange(0, inputs.q.shape[1], length)
    state, (out, states) = lax.scan(piece, state, starts)
    return (state, _joined(out)), (starts, states, inputs, restart)


def _in_equal_pieces_backward(run, length, residuals, d_results):
    starts, states, inputs, restart = residuals
    d_state, d_out = d_results

    def piece(d_state, at):
        start, state = at
        x, restarts, d_o = _piece(start, length, (inputs, restart, d_out))
        _, gradient = jax.vjp(lambda state, x: run(state, x, restarts), state, x)
        return gradient((d_state, d_o))

    d_state, d_inputs = lax.scan(piece, d_state, (starts, states), reverse=True)
    return d_state, jax.tree.map(_joined, d_inputs), None


_in_equal_pieces = jax.custom_vjp(_run_equal_pieces, nondiff_argnums=(0, 1))
_in_equal_pieces.defvjp(_in_equal_pieces_forward, _in_equal_pieces_backward)


def _in_pieces(
    run: _Run, length: int, state: Array, inputs: _Inputs, restart: Array | None
) -> tuple[Array, Array]:
    """The `_Run` that does `run` on `length` steps at a time, then on those left over."""
    time = inputs.q.shape[1]
    if time <= length:
        return run(state, inputs, restart)
    left_over = time % length
    whole = time - left_over
    state, out = _in_equal_pieces(run, length, state, *_piece(0, whole, (inputs, restart)))
    if left_over:
        state, rest = run(state, *_piece(whole, left_over, (inputs, restart)))
        out = jnp.concatenate([out, rest], axis=1)
    return state, out


def document_starts(segment_ids: Array) -> Array:
    """Where the id changes from the step before, `[B, T]` bool; never at step 0."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)))


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
    batch, _, heads, n_state = q.shape
    wide = wide_dtype(q.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, n_state, v.shape[-1]), wide)
    restart = None if segment_ids is None else document_starts(segment_ids)
    run = functools.partial(_steps, linear_state)
    if checkpoint_every > MAX_WRITTEN_OUT:
        run = functools.partial(_in_pieces, run, MAX_WRITTEN_OUT)
    inputs = _Inputs(q, k, v, decay, write_gate)
    state, out = _in_pieces(run, checkpoint_every, initial_state.astype(wide), inputs, restart)
    return out, state
