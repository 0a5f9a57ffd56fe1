"""One step of the recurrence, forward, on a block's state in registers.

The state is `[heads, values, keys]`; the formulas are those of `e88_jax.reference`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.recurrence.block import HEADS, KEYS, VALUES
from pallas_kernels.recurrence.forward_registers import Registers


class Step(NamedTuple):
    """Inputs of one step, in registers."""

    k: Array  # KEYS, as stored
    v: Array  # VALUES, as stored
    decay: Array  # HEADS, float32; 0 where a document starts
    write_gate: Array | None  # HEADS, float32
    keep: Array | None  # HEADS, float32; 0 where a document starts, else 1
    live: Array | None  # HEADS, float32; 0 past the end of the row, else 1


class Update(NamedTuple):
    """Results of one step."""

    state: Array  # STATE
    delta: Array  # VALUES: v - S^T k


def _times(registers: Registers, x: Array, scalar: Array | None) -> Array:
    """x, of VALUES, times a scalar for each head."""
    return x if scalar is None else x * registers.spread(scalar, HEADS, VALUES)


def read(registers: Registers, state: Array, *keys: Array) -> tuple[Array, ...]:
    """VALUES: S^T k for each of the keys."""
    return registers.sums_over_keys(state, *(registers.wide(k, KEYS) for k in keys))


def update(registers: Registers, state: Array, read: Array, x: Step, linear_state: bool) -> Update:
    """The state after the step, given `read`, S^T k of the state before it."""
    k = registers.spread(registers.wide(x.k, KEYS), KEYS)
    delta = registers.wide(x.v, VALUES) - _times(registers, read, x.keep)
    correction = _times(registers, delta, x.write_gate)
    after = state * registers.spread(x.decay, HEADS) + k * registers.spread(correction, VALUES)
    if not linear_state:
        after = jnp.tanh(after)
    if x.live is not None:
        after = jnp.where(registers.spread(x.live, HEADS) > 0, after, state)
    return Update(after, delta)
