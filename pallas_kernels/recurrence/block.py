"""A block of the recurrence's kernels: the part of every array that one warpgroup reads or writes.

The state of a block is written `[heads, values, keys]`, the transpose of the op's `[N, V]`: V is
the slow axis. Other arrays are named by the axes that they share with it.
"""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.copies import Chunks, Input
from pallas_kernels.recurrence.tuning_config import PaddedSizes, TuningConfig

Axes: TypeAlias = tuple[int, ...]
STATE: Axes = (0, 1, 2)
VALUES: Axes = (0, 1)
KEYS: Axes = (0, 2)
HEADS: Axes = (0,)


class Block(NamedTuple):
    """Which rows, heads, columns and keys a block has, padding included."""

    b: Index
    heads: Index
    values: Index
    keys: Index
    head_block: Index
    value_block: Index

    @classmethod
    def from_index(cls, index: Index, sizes: PaddedSizes, config: TuningConfig) -> "Block":
        """Block `index` of those of all rows of the batch, columns fastest."""
        index, value_block = _divmod(index, sizes.values // config.values)
        b, head_block = _divmod(index, sizes.heads // config.heads)
        heads = pl.ds(head_block * config.heads, config.heads)
        values = pl.ds(value_block * config.values, config.values)
        # No start is a Python int: JAX 0.12 refuses slices that it can see to pass the array's end,
        # where the copy engine reads zeros.
        keys = pl.ds(jnp.int32(0), sizes.keys)
        return cls(b, heads, values, keys, head_block, value_block)

    def steps(self, ref: Ref, axes: Axes, t: Index) -> Ref:
        """Steps t of an array `[B, T, H, ...]`, or `[B, H, scalars, T]` for HEADS."""
        if axes == HEADS:
            return ref.at[self.b, self.heads, :, t]
        if axes == KEYS:
            return ref.at[self.b, t, self.heads, self.keys]
        return ref.at[self.b, t, self.heads, self.values]

    def input(self, ref: Ref, slots: Ref, axes: Axes, chunks: Chunks) -> Input:
        """The chunks of an array, of these axes, that go to these slots."""

        def chunk(i: Index) -> Ref:
            if axes == HEADS:  # time is innermost, where a copy starts at 16 bytes
                t = pl.ds(i * chunks.size, slots.shape[-1])
            else:
                t = pl.ds(chunks.start(i), chunks.size)
            return self.steps(ref, axes, t)

        return Input(chunk, slots)


def _divmod(x: Index, y: int) -> tuple[Index, Index]:
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))
