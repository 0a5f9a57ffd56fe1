"""The recurrence as a differentiable function: forward and backward kernel, joined."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import target
from pallas_kernels.common.aliases import Interpret
from pallas_kernels.common.padding import cut
from pallas_kernels.common.sizes import round_up
from pallas_kernels.limits import MAX_GROUPED_INTERVAL, SAVED_STATE_GROUP, require_supported
from pallas_kernels.recurrence.calls import Options, backward_call, forward_call
from pallas_kernels.recurrence.operands import Inputs
from pallas_kernels.recurrence.tuning_config import TuningConfig


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
    forward_config: TuningConfig | None = None,
    backward_config: TuningConfig | None = None,
    interpret: Interpret = None,
) -> tuple[Array, Array]:
    """The recurrence by the GPU kernels; differentiable once, in reverse mode.

    For the backward pass it saves its arguments and, in v's dtype, a state every
    `saved_state_interval` steps, rounded up to a multiple of 32; up to 32, a state every 8 steps,
    and delta, `v - S^T k`, in float32 in place of v.

    Args:
        q, k: `[B, T, H, N]`, float32 or bfloat16.
        v: `[B, T, H, V]`, dtype of q.
        decay: `[B, T, H]` float32.
        write_gate: `[B, T, H]` float32, or None for 1.
        initial_state: `[B, H, N, V]` float32, or None for zeros.
        starts: `[B, T]` bool, or None: the step starts from a zero state. A state that is not
            finite is not cleared: callers give finite inputs.
        live: `[B, T]` bool, or None: where it does not hold, the state stays as it is. There q, k,
            v and the gradient of out must be zeros; out and the gradients of decay and the write
            gate mean nothing.
        linear_state: leave out the tanh.
        saved_state_interval: steps between saved states, as above; at most T counts.
        forward_config, backward_config: tuning configs of the kernels; by default the functions of
            these names in `tuning.py` choose them, for `target.current()`.
        interpret: `InterpretGPUParams` to run the kernels on a CPU.

    Returns:
        out `[B, T, H, V]` in v's dtype and the final state `[B, H, N, V]` float32.

    Raises:
        NotImplementedError: sizes or a dtype that the kernels do not take.
    """
    _require_supported(q, v)
    options = Options(linear_state, target.current(), forward_config, backward_config, interpret)
    interval = min(saved_state_interval, q.shape[1])
    if interval <= MAX_GROUPED_INTERVAL:
        interval = SAVED_STATE_GROUP
    else:
        interval = round_up(interval, MAX_GROUPED_INTERVAL)
    inputs = Inputs(q, k, v, decay, write_gate, starts, live)
    return _recurrence(options, interval, inputs, initial_state)


def _require_supported(q: Array, v: Array) -> None:
    require_supported(q.shape[-1], v.shape[-1], q.dtype.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(
    options: Options, interval: int, x: Inputs, initial_state: Array | None
) -> tuple[Array, Array]:
    out, final_state, _ = forward_call(options, None, False)(x, initial_state)
    return out, final_state


def _recurrence_forward(
    options: Options, interval: int, x: Inputs, initial_state: Array | None
) -> Any:
    save_delta = interval == SAVED_STATE_GROUP
    out, final_state, saved = forward_call(options, interval, save_delta)(x, initial_state)
    if save_delta:
        x = x._replace(v=saved.delta)
    return (out, final_state), (x, initial_state, saved.states)


def _recurrence_backward(
    options: Options, interval: int, residuals: Any, d_results: tuple[Array, Array]
) -> tuple[Inputs, Array | None]:
    x, initial_state, saved_states = residuals
    if interval == SAVED_STATE_GROUP:
        backward = backward_call(options)
    else:
        backward = functools.partial(_backward_by_segments, options, interval)
    d, d_initial_state = backward(x, saved_states, *d_results)
    return d, None if initial_state is None else d_initial_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _backward_by_segments(
    options: Options,
    length: int,
    x: Inputs,
    saved_states: Array,
    d_out: Array,
    d_final_state: Array,
) -> tuple[Inputs, Array]:
    """As `backward_call`, from saved states `length` steps apart.

    For each segment between two of them, the forward kernel first recomputes the states before its
    groups, and delta.
    """
    time = x.q.shape[1]

    def segment(d_state: Array, i: Array | int, steps: int) -> tuple[Array, Inputs]:
        own, d_o = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, i * length, steps, axis=1), (x, d_out)
        )
        state = lax.dynamic_index_in_dim(saved_states, i, axis=2, keepdims=False)
        state = jnp.swapaxes(cut(state, *d_final_state.shape[:1:-1]), 2, 3).astype(jnp.float32)
        *_, saved = forward_call(options, SAVED_STATE_GROUP, True)(own, state)
        own = own._replace(v=saved.delta)
        d_own, d_state = backward_call(options)(own, saved.states, d_o, d_state)
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
