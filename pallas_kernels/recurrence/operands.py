"""Operands of the kernels: the op's arrays, laid out for copies to shared memory.

Zero heads, keys and columns are exact. Zero steps are not: a kernel stops at the T that it is told.
Copies find zeros past the end of an array, so that most arrays need no padding.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.common.aliases import Index, Interpret, Ref
from pallas_kernels.common.padding import padded
from pallas_kernels.common.sizes import round_up
from pallas_kernels.recurrence.block import HEADS, KEYS, VALUES
from pallas_kernels.recurrence.forward_registers import Registers
from pallas_kernels.recurrence.forward_step import Step
from pallas_kernels.recurrence.tuning_config import KEYS_MULTIPLE, TuningConfig


class Inputs(NamedTuple):
    """Inputs of every step, as the op takes them."""

    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]; for the backward kernel delta, float32
    decay: Array  # [B, T, H] float32
    write_gate: Array | None  # [B, T, H] float32
    starts: Array | None  # [B, T] bool: the step starts from a zero state
    live: Array | None  # [B, T] bool: where it does not hold, the state stays

    @property
    def n_scalars(self) -> int:
        """Scalars of a step."""
        return sum(x is not None for x in (self.decay, self.write_gate, self.starts, self.live))


class Operands(NamedTuple):
    """Inputs as the kernels read them."""

    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]; for the backward kernel delta, float32
    scalars: Array  # [B, H, S, T] float32: decay, then those given of the write gate, keep and live
    has_write_gate: bool
    has_keep: bool
    has_live: bool
    time: int  # T; the arrays may have more steps, which the kernels skip


def _columns(x: Array, multiple: int, config: TuningConfig, interpret: Interpret) -> Array:
    """`[B, T, H, columns]`, padded for copies of whole blocks."""
    # Copies find zeros past the end of an axis, of rows that start at 16 bytes. The interpreter of
    # JAX 0.10.2 does not read there.
    if interpret is None:
        return padded(x, 1, 1, 1, 16 // x.dtype.itemsize)
    short = x.shape[1] < config.chunk
    return padded(x, 1, config.chunk if short else 1, config.heads, multiple)


def prepare(x: Inputs, config: TuningConfig, interpret: Interpret) -> Operands:
    """The kernels' operands; q, k and v are copied only where rows do not start at 16 bytes."""
    time = x.q.shape[1]
    decay, keep = x.decay, None
    if x.starts is not None:
        starts = jnp.broadcast_to(x.starts[:, :, None], decay.shape)
        decay = jnp.where(starts, jnp.zeros_like(decay), decay)
        keep = 1 - starts.astype(jnp.float32)
    live = None
    if x.live is not None:
        live = jnp.broadcast_to(x.live[:, :, None], decay.shape).astype(jnp.float32)
    rows = [row_major(row) for row in (decay, x.write_gate, keep, live) if row is not None]
    scalars = padded(jnp.transpose(jnp.stack(rows), (1, 3, 0, 2)), 1, config.heads, 1, 1)
    # The last chunk's copy must end inside the array.
    ends = round_up(time, config.chunk) + config.scalar_steps
    scalars = jnp.pad(scalars, ((0, 0), (0, 0), (0, 0), (0, ends - time)))
    return Operands(
        _columns(x.q, KEYS_MULTIPLE, config, interpret),
        _columns(x.k, KEYS_MULTIPLE, config, interpret),
        prepare_values(x.v, config, interpret),
        scalars,
        has_write_gate=x.write_gate is not None,
        has_keep=keep is not None,
        has_live=live is not None,
        time=time,
    )


def prepare_values(x: Array, config: TuningConfig, interpret: Interpret) -> Array:
    """v, delta or the gradient of out, `[B, T, H, V]`, for the kernels."""
    return _columns(x, config.values, config, interpret)


def prepare_states(states: Array, config: TuningConfig) -> Array:
    """States `[B, H, ..., V, N]` for the kernels, which load them without the copy engine."""
    between = (1,) * (states.ndim - 4)
    return padded(states, 1, config.heads, *between, config.values, KEYS_MULTIPLE)


def row_major(x: Array) -> Array:
    """x, laid out with its last axis contiguous.

    The kernels read and write scalars with time innermost. Without this, XLA carries that layout
    back to the matmul that gives q, k and v with the scalars, and copies q, k and v.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def load_step(
    registers: Registers, x: Operands, k: Ref, v: Ref, scalars: Ref, t: Index, first: int
) -> Step:
    """Inputs of the step in row t of a chunk of k and v, and in row `t - first` of its scalars."""

    def scalar(i: int) -> Array:
        return registers.load(scalars.at[:, i, t - first], HEADS)

    return Step(
        k=registers.load(k.at[t], KEYS),
        v=registers.load(v.at[t], VALUES),
        decay=scalar(0),
        write_gate=scalar(1) if x.has_write_gate else None,
        keep=scalar(1 + x.has_write_gate) if x.has_keep else None,
        live=scalar(1 + x.has_write_gate + x.has_keep) if x.has_live else None,
    )
