"""What the kernels read: the op's arguments, padded and laid out for bulk copies."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import COPY_BYTES, round_up
from pallas_kernels.cell import Step
from pallas_kernels.layouts import HEADS, KEY_LANES, KEYS, VALUES, Registers


class Operands(NamedTuple):
    """Zero heads, keys and columns are exact; zero steps are not, and only scalars have any."""

    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]
    scalars: Array  # [B, H, S, T] float32: decay, then the write gate and keep where given
    has_write_gate: bool
    has_keep: bool


def padded(x: Array, *sizes: tuple[int, int]) -> Array:
    """x with zeros after it, so that each `(axis, multiple)` holds."""
    widths = [(0, 0)] * x.ndim
    for axis, multiple in sizes:
        widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def load_step(registers: Registers, x: Operands, slots: Any, slot: Any, t: Any, first: int) -> Step:
    """What a step reads, from row t of the double buffers of k and v and `t - first` of scalars."""
    k, v, scalars = slots

    def scalar(i: int) -> Array:
        return registers.load(scalars.at[slot, :, i, t - first], HEADS)

    return Step(
        k=registers.load(k.at[slot, t], KEYS),
        v=registers.load(v.at[slot, t], VALUES),
        decay=scalar(0),
        write_gate=scalar(1) if x.has_write_gate else None,
        keep=scalar(1 + x.has_write_gate) if x.has_keep else None,
    )
