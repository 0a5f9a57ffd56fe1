"""The recurrence in plain JAX: the definition that every other implementation is held to.

`_step` is one step. `scan_steps` runs any recurrence by its step: `_steps` unrolls a few, and
`_in_pieces` runs any number piece by piece and keeps the states in between. Derivatives are JAX's
own, of any order and in both modes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from e88_jax.meshes import varying_alike
from e88_jax.precision import wide_dtype
from e88_jax.typed import checkpoint, einsum

MAX_WRITTEN_OUT = 8
"""Most steps unrolled in a row. Their states stay at hand for the backward pass, where a loop would
copy each to a stack and back; more steps make longer programs."""

Tree = TypeVar("Tree")


class Inputs(NamedTuple):
    """Inputs of one step; with a time axis after B, inputs of several."""

    q: Array  # [B, H, N]
    k: Array  # [B, H, N]
    v: Array  # [B, H, V]
    decay: Array  # [B, H]
    write_gate: Array | None  # [B, H]
    starts: Array | None  # [B] bool: a document starts here, from a zero state
    live: Array | None  # [B] bool: False past the end of a row, where its state stays


Step = Callable[[Array, Any], tuple[Array, Array]]
"""`(state [B, H, N, V], inputs of a step) -> (state, out [B, H, V])`."""

_Run = Callable[[Array, Any], tuple[Array, Array]]
"""`(state [B, H, N, V], inputs of L steps) -> (state, out [B, L, H, V])`."""

# Outer products are einsums too: on a CPU the gradient of a broadcast multiplication takes up to
# four times as long.
_einsum = functools.partial(einsum, precision=lax.Precision.HIGHEST)


def _read(state: Array, key: Array) -> Array:
    return _einsum("bhnv,bhn->bhv", state, key)


def _in_rows(rows: Array, x: Array, otherwise: Array) -> Array:
    """x in these rows of the batch, `otherwise` in the others."""
    return jnp.where(rows[:, None, None, None], x, otherwise)


def _step(linear_state: bool, state: Array, x: Inputs) -> tuple[Array, Array]:
    """The state after a step, and its output."""
    before = state
    if x.starts is not None:
        before = _in_rows(x.starts, jnp.zeros_like(state), state)
    delta = x.v - _read(before, x.k)
    if x.write_gate is not None:
        delta = x.write_gate[..., None] * delta
    after = x.decay[..., None, None] * before + _einsum("bhn,bhv->bhnv", x.k, delta)
    if not linear_state:
        after = jnp.tanh(after)
    if x.live is not None:
        after = _in_rows(x.live, after, state)
    return after, _read(after, x.q)


def _steps(step: Step, dtype: jnp.dtype, state: Array, inputs: Any) -> tuple[Array, Array]:
    """A `_Run` that writes all its steps out, for outputs of this dtype."""
    out: list[Array] = []
    wide = state.dtype
    for t in range(_length(inputs)):

        def at_step(x: Array, t: int = t) -> Array:
            x = x[:, t]
            return x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x

        state, read = step(state, jax.tree.map(at_step, inputs))
        out.append(read)
    return state, jnp.stack(out, axis=1).astype(dtype)


def _length(inputs: Any) -> Any:
    """Steps of arrays `[B, T, ...]`; symbolic under `jax.export`."""
    return jax.tree.leaves(inputs)[0].shape[1]


def _piece(start: Array | int, length: int, inputs: Tree) -> Tree:
    """`length` steps of arrays `[B, T, ...]`: a slice of each, where a transpose would copy all."""

    def of(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, length, axis=1)

    return jax.tree.map(of, inputs)


def _in_pieces(run: _Run, length: int, state: Array, inputs: Any) -> tuple[Array, Array]:
    """The `_Run` that applies `run` to `length` steps at a time, then to the remainder.

    The backward pass keeps the state before each piece and recomputes the piece.
    """
    time = _length(inputs)
    if not isinstance(time, int):  # symbolic, of `jax.export`: pieces of one step divide it
        length = 1
    elif time <= length:
        return run(state, inputs)
    left_over = time % length
    whole = time - left_over

    def piece(state: Array, start: Array) -> tuple[Array, Array]:
        return run(state, _piece(start, length, inputs))

    recomputed = checkpoint(piece, prevent_cse=False)  # in a loop nothing could be merged
    state, outs = lax.scan(recomputed, state, jnp.arange(0, whole, length))  # [pieces, B, L, H, V]
    out = jnp.moveaxis(outs, 0, 1).reshape(outs.shape[1], whole, *outs.shape[3:])
    if isinstance(left_over, int) and left_over:
        state, rest = run(state, _piece(whole, left_over, inputs))
        out = jnp.concatenate([out, rest], axis=1)
    return state, out


def scan_steps(
    step: Step, state: Array, inputs: Any, dtype: jnp.dtype, saved_state_interval: int
) -> tuple[Array, Array]:
    """A recurrence over all steps.

    Args:
        step: one step; its inputs' floats are in the state's dtype.
        state: `[B, H, N, V]`, the state before the first step.
        inputs: a tree of arrays `[B, T, ...]`.
        dtype: dtype of the outputs.
        saved_state_interval: steps between states that are saved for the backward pass.

    Returns:
        `(out [B, T, H, V], final_state)`.
    """
    run = functools.partial(_steps, step, dtype)
    if saved_state_interval > MAX_WRITTEN_OUT:
        run = functools.partial(_in_pieces, run, MAX_WRITTEN_OUT)
    state, out = _in_pieces(run, saved_state_interval, state, inputs)
    return out, state


def scan_recurrence(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
    starts: Array | None,
    live: Array | None,
    *,
    linear_state: bool,
    saved_state_interval: int,
) -> tuple[Array, Array]:
    """`e88_recurrence` by `lax.scan`; arguments as there, already checked.

    `starts` and `live`, `[B, T]` bool, stand for its `segment_ids` and `lengths`: where a document
    starts, and where a row has not ended. Outputs past the end of a row mean nothing.
    """
    batch, _, heads, n_state = q.shape
    wide = wide_dtype(q.dtype)
    state = initial_state
    if state is None:
        state, q = varying_alike(jnp.zeros((batch, heads, n_state, v.shape[-1]), wide), q)
    step = functools.partial(_step, linear_state)
    inputs = Inputs(q, k, v, decay, write_gate, starts, live)
    return scan_steps(step, state.astype(wide), inputs, v.dtype, saved_state_interval)
