"""The recurrence as a differentiable function: the two kernels, joined."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.calls import Options, backward_call, forward_call
from pallas_kernels.geometry import GROUP, Geometry, round_up
from pallas_kernels.operands import Inputs, cut

KEEPS_GROUPS = 32
"""Most steps between checkpoints, as asked for, where instead the state before each group is kept,
which the backward kernel starts from. That is faster than to make it again; `README.md` says by how
much, and what it costs in memory. Above, they are multiples of it apart, as chunks divide it."""


def recurrence(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
    starts: Array | None = None,
    live: Array | None = None,
    *,
    linear_state: bool,
    saved_state_interval: int,
    forward_geometry: Geometry | None = None,
    backward_geometry: Geometry | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The recurrence by the GPU kernels; differentiable once, in reverse mode.

    Between the two passes it keeps its arguments, and, in v's dtype, a state every
    `saved_state_interval` steps, rounded up to a multiple of 32; up to 32, a state every 8 steps,
    and `v - S^T k` in float32 in place of v.

    Args:
        q, k: `[B, T, H, N]`, float32 or bfloat16.
        v: `[B, T, H, V]`, dtype of q.
        decay: `[B, T, H]` float32.
        write_gate: `[B, T, H]` float32, or None for 1.
        initial_state: `[B, H, N, V]` float32, or None for zeros.
        starts: `[B, T]` bool, or None: the step starts from a zero state. A state that is not
            finite is not cleared: callers give finite inputs.
        live: `[B, T]` bool, or None: where it does not hold, the state stays as it is. Of such
            steps q, k, v and the gradient of out must be zeros; their outputs, and their gradients
            of decay and the write gate, mean nothing.
        linear_state: leave out the tanh.
        saved_state_interval: steps between the states that are kept, as above; at most T counts.
        forward_geometry, backward_geometry: how the kernels cut up the work; chosen by the
            functions of these names in `tuning.py` if not given.
        interpret: `compat.InterpretGPUParams` to run the kernels on a CPU.

    Returns:
        out `[B, T, H, V]` in v's dtype and the final state `[B, H, N, V]` float32.
    """
    options = Options(linear_state, forward_geometry, backward_geometry, interpret)
    every = min(saved_state_interval, q.shape[1])
    every = GROUP if every <= KEEPS_GROUPS else round_up(every, KEEPS_GROUPS)
    inputs = Inputs(q, k, v, decay, write_gate, starts, live)
    return _recurrence(options, every, inputs, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(options, every, x, initial_state):
    out, final_state, _ = forward_call(options, None, False)(x, initial_state)
    return out, final_state


def _recurrence_forward(options, every, x, initial_state):
    keep_errors = every == GROUP
    out, final_state, kept = forward_call(options, every, keep_errors)(x, initial_state)
    if keep_errors:
        x = x._replace(v=kept.errors)
    return (out, final_state), (x, initial_state, kept.checkpoints)


def _recurrence_backward(options, every, residuals, d_results):
    x, initial_state, checkpoints = residuals
    if every == GROUP:
        backward = backward_call(options)
    else:
        backward = functools.partial(_backward_by_segments, options, every)
    d, d_initial_state = backward(x, checkpoints, *d_results)
    if initial_state is None:
        d_initial_state = None
    return d, d_initial_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _backward_by_segments(
    options: Options, length: int, x: Inputs, checkpoints: Array, d_out: Array, d_final_state: Array
) -> tuple[Inputs, Array]:
    """As `backward_call`, but each segment of so many steps first makes what it needs from its own
    checkpoint."""
    time = x.q.shape[1]

    def segment(d_state: Array, i: Array | int, steps: int) -> tuple[Array, Inputs]:
        own, d_o = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, i * length, steps, axis=1), (x, d_out)
        )
        state = lax.dynamic_index_in_dim(checkpoints, i, axis=2, keepdims=False)
        state = jnp.swapaxes(cut(state, *d_final_state.shape[:1:-1]), 2, 3).astype(jnp.float32)
        *_, kept = forward_call(options, GROUP, True)(own, state)
        own = own._replace(v=kept.errors)
        d_own, d_state = backward_call(options)(own, kept.checkpoints, d_o, d_state)
        return d_state, d_own

    n_whole, left_over = divmod(time, length)
    d_state, parts = d_final_state, []
    if left_over:
        d_state, d_last = segment(d_state, n_whole, left_over)
        parts = [d_last]
    if n_whole:
        d_state, d_whole = lax.scan(
            lambda d_state, i: segment(d_state, i, length),
            d_state,
            jnp.arange(n_whole, dtype=jnp.int32),
            reverse=True,
        )
        parts = [jax.tree.map(_joined, d_whole), *parts]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts), d_state


def _joined(segments: Array) -> Array:
    """From `[segments, B, steps, ...]` to `[B, T, ...]`."""
    x = jnp.moveaxis(segments, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
