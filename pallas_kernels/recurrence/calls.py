"""The forward and backward kernel as calls on the op's arrays, under `vmap` and sharding too.

`op.py` joins them to a differentiable function.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.aliases import AxesTree, Interpret
from pallas_kernels.common.batching import over_rows
from pallas_kernels.common.padding import cut
from pallas_kernels.recurrence import tuning
from pallas_kernels.recurrence.backward_kernel import backward
from pallas_kernels.recurrence.forward_kernel import Saved, forward
from pallas_kernels.recurrence.operands import (
    Inputs,
    prepare,
    prepare_states,
    prepare_values,
    row_major,
)
from pallas_kernels.recurrence.tuning_config import TuningConfig
from pallas_kernels.target import Target

# Names of the axes of arguments and results.
INPUTS: AxesTree = Inputs._make(["b t h n", "b t h n", "b t h v", "b t h", "b t h", "b t", "b t"])
STATE = "b h n v"
# Keys and columns keep their padding, as cutting and padding again takes time; heads, which may be
# sharded, do not.
SAVED: AxesTree = Saved._make(["b h saved values keys", "b t h values"])


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call.

    Attributes:
        linear_state: leave out the tanh.
        target: the device that the kernels are tuned for.
        forward_config, backward_config: None to choose by the shapes and the target.
        interpret: None, or the interpreter's parameters.
    """

    linear_state: bool
    target: Target
    forward_config: TuningConfig | None
    backward_config: TuningConfig | None
    interpret: Interpret


def _chosen(
    choose: Callable[..., TuningConfig], x: Inputs, target: Target, *options: Any
) -> TuningConfig:
    batch, _, heads, n_state = x.q.shape
    return choose(batch, heads, n_state, x.v.shape[-1], target, x.q.dtype, *options)


@functools.cache
def forward_call(
    options: Options, saved_state_interval: int | None, save_delta: bool
) -> Callable[[Inputs, Array | None], tuple[Array, Array, Any]]:
    """From inputs and the initial state to `out`, the final state, and `Saved` or None.

    Saved state i, in v's dtype, is the state before step `i * saved_state_interval`, a multiple of
    `SAVED_STATE_GROUP`.
    """

    def call(x: Inputs, initial_state: Array | None) -> tuple[Array, Array, Saved | None]:
        config = options.forward_config or _chosen(
            tuning.forward_config, x, options.target, x.n_scalars
        )
        if saved_state_interval is not None and config.chunk % saved_state_interval:
            chunk = math.gcd(config.chunk, saved_state_interval)
            config = dataclasses.replace(config, chunk=chunk)
        if initial_state is not None:
            initial_state = prepare_states(jnp.swapaxes(initial_state, 2, 3), config)
        out, final_state, saved = forward(
            prepare(x, config, options.interpret),
            initial_state,
            config,
            saved_state_interval,
            save_delta,
            linear_state=options.linear_state,
            interpret=options.interpret,
        )
        _, time, heads, n_state = x.q.shape
        n_value = x.v.shape[-1]
        if saved is not None:
            delta = None if saved.delta is None else saved.delta[:, :, :heads]
            saved = Saved(saved.states[:, :heads], delta)
        return (
            cut(out, time, heads, n_value),
            jnp.swapaxes(cut(final_state, heads, n_value, n_state), 2, 3),
            saved,
        )

    def results(x: Inputs, _: AxesTree) -> AxesTree:
        saved = SAVED if save_delta else SAVED._replace(delta=None)
        return x.v, STATE, None if saved_state_interval is None else saved

    return over_rows(call, (INPUTS, STATE), results, options.interpret is None)


@functools.cache
def backward_call(
    options: Options,
) -> Callable[[Inputs, Array, Array, Array], tuple[Inputs, Array]]:
    """From inputs, saved states and the gradients of `out` and of the final state to the gradients
    of the inputs and of the initial state.

    The saved states are `SAVED_STATE_GROUP` steps apart, and the inputs have delta in place of v.
    """

    def call(
        x: Inputs, saved_states: Array, d_out: Array, d_final_state: Array
    ) -> tuple[Inputs, Array]:
        has_write_gate = x.write_gate is not None
        config = options.backward_config or _chosen(
            tuning.backward_config,
            x._replace(v=d_out),
            options.target,
            x.n_scalars,
            has_write_gate,
        )
        d = backward(
            prepare(x, config, options.interpret),
            prepare_values(d_out, config, options.interpret),
            prepare_states(jnp.swapaxes(d_final_state, 2, 3), config),
            prepare_states(saved_states, config),
            config,
            linear_state=options.linear_state,
            interpret=options.interpret,
        )
        _, time, heads, n_state = x.q.shape
        n_value = d_out.shape[-1]

        def total(partial: Array) -> Array:
            """The sum of the blocks' split-V partial sums."""
            return jnp.sum(partial, axis=0, dtype=jnp.float32)

        d_q, d_k = (cut(total(partial), time, heads, n_state) for partial in (d.d_q, d.d_k))
        d_scalars = cut(total(d.d_scalars)[:, :heads], time)  # [B, H, S, T]
        d_decay, *d_write_gate = (
            row_major(jnp.swapaxes(d_scalars[:, :, i], 1, 2)) for i in range(d_scalars.shape[2])
        )
        if x.starts is not None:
            starts = jnp.broadcast_to(x.starts[:, :, None], d_decay.shape)
            d_decay = jnp.where(starts, jnp.zeros_like(d_decay), d_decay)
        d_inputs = Inputs(
            q=d_q.astype(x.q.dtype),
            k=d_k.astype(x.k.dtype),
            v=cut(d.d_v, time, heads, n_value),
            decay=d_decay,
            write_gate=d_write_gate[0] if d_write_gate else None,
            starts=None,
            live=None,
        )
        return d_inputs, jnp.swapaxes(cut(d.d_initial_state, heads, n_value, n_state), 2, 3)

    def results(x: Inputs, *_: AxesTree) -> AxesTree:
        return x._replace(v=INPUTS.v, starts=None, live=None), STATE

    arguments = INPUTS._replace(v=SAVED.delta), SAVED.states, INPUTS.v, STATE
    return over_rows(call, arguments, results, options.interpret is None)
