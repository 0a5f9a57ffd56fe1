"""One step of the recurrence on a block's state in registers, and its gradient.

The state is `[heads, values, keys]`; the formulas are those of `e88_jax.reference`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.keys import Keys
from pallas_kernels.layouts import HEADS, VALUES, Registers


class Step(NamedTuple):
    """What one step reads, in registers; its row of keys is as `Keys.outer_row` gives it."""

    row: Any
    v: Array  # VALUES, as stored
    decay: Array  # HEADS, float32; 0 where a document starts
    write_gate: Array | None  # HEADS, float32
    keep: Array | None  # HEADS, float32; 0 where a document starts, else 1


class Update(NamedTuple):
    state: Array  # STATE
    error: Array  # VALUES: v - S^T k
    correction: Array  # VALUES: the error times the write gate


def _times(registers: Registers, x: Array, scalar: Array | None) -> Array:
    """`x`, of VALUES, times a scalar for each head."""
    return x if scalar is None else x * registers.spread(scalar, HEADS, VALUES)


def update(keys: Keys, state: Array, read: Array, x: Step, linear_state: bool) -> Update:
    """The step, given what was read: S^T k of the state before it."""
    registers = keys.registers
    error = registers.wide(x.v, VALUES) - _times(registers, read, x.keep)
    correction = _times(registers, error, x.write_gate)
    state = state * registers.spread(x.decay, HEADS)
    state = keys.add_outer(state, x.row, of_k=correction)
    return Update(state if linear_state else jnp.tanh(state), error, correction)


class Gradient(NamedTuple):
    d_before: Array  # STATE
    d_sum: Array  # STATE: of what is inside the tanh
    d_correction: Array  # VALUES
    d_v: Array  # VALUES
    d_read: Array  # VALUES: of S^T k
    narrow: Array  # STATE: d_sum in the dtype of the inputs


def step_back(
    keys: Keys, after: Array, d_after: Array, d_out: Array, sum_row: Any, x: Step,
    linear_state: bool,
) -> Gradient:
    """The gradients of one step that the step before it waits for: the rest are sums over them."""
    registers = keys.registers
    dtype = d_out.dtype
    d_after = keys.add_outer(d_after, x.row, of_q=registers.wide(d_out, VALUES))
    d_sum = d_after if linear_state else d_after * (1 - after * after)
    narrow = d_sum.astype(dtype)
    d_correction = keys.sum_gradient(d_sum, narrow, sum_row)
    d_v = _times(registers, d_correction, x.write_gate)
    d_read = -_times(registers, d_v, x.keep)
    d_before = d_sum * registers.spread(x.decay, HEADS)
    d_before = keys.add_outer(d_before, x.row, of_k=d_read)
    return Gradient(d_before, d_sum, d_correction, d_v, d_read, narrow)
