"""A block of the recurrence's kernels: the part of every array that one warpgroup reads or writes.

The state of a block is written `[heads, values, keys]`, the transpose of the op's `[N, V]`: V is
the slow axis. Other arrays are named by the axes that they share with it.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Interpret, Ref
from pallas_kernels.common.async_copies import AsyncCopies
from pallas_kernels.common.bulk_copies import BulkCopies
from pallas_kernels.common.copies import Chunks, Copies, Input
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
        # where copies find zeros. Nor is it a constant, which `inline` cannot slice by.
        keys = pl.ds(index * 0, sizes.keys)
        return cls(b, heads, values, keys, head_block, value_block)

    def steps(self, ref: Ref, axes: Axes, t: Index) -> Ref:
        """Steps t of an array `[B, T, H, ...]`, or `[B, H, scalars, T]` for HEADS."""
        if axes == HEADS:
            return ref.at[self.b, self.heads, :, t]
        if axes == KEYS:
            return ref.at[self.b, t, self.heads, self.keys]
        return ref.at[self.b, t, self.heads, self.values]

    def copies(
        self,
        axes: Mapping[str, Axes],
        ref: Mapping[str, Ref],
        chunks: Chunks,
        config: TuningConfig,
        warpgroup: Index,
        interpret: Interpret,
    ) -> Copies:
        """The copies of inputs of these axes, and of results."""
        inputs = [self._input(ref[x], ref[f"{x}_slots"], of, chunks) for x, of in axes.items()]
        if config.copies == "bulk":
            return BulkCopies(chunks.count, inputs, ref["loaded"], warpgroup, interpret)
        if interpret is None:
            return AsyncCopies(chunks.count, inputs)
        from pallas_kernels.interpreter.copies import ArrayCopies

        return ArrayCopies(chunks.count, inputs)

    def _input(self, ref: Ref, slots: Ref, axes: Axes, chunks: Chunks) -> Input:
        """The chunks of an array, of these axes, that go to these slots."""

        def steps(i: Index) -> Index:
            if axes == HEADS:  # time is innermost, where a copy starts at 16 bytes
                return pl.ds(i * chunks.size, slots.shape[-1])
            return pl.ds(chunks.start(i), chunks.size)

        def inside(i: Index) -> tuple[Index | None, ...]:
            if axes == HEADS:  # padded to whole blocks
                return None, None, None
            _, time, heads, columns = ref.shape
            return (
                None if time >= chunks.size else time - chunks.start(i),
                _inside(self.heads, heads),
                _inside(self.keys if axes == KEYS else self.values, columns),
            )

        return Input(lambda i: self.steps(ref, axes, steps(i)), slots, inside)


def _inside(part: Index, size: int) -> Index | None:
    """Elements of a block's part of an axis that the axis has; None if all parts are inside."""
    return None if size % part.size == 0 else size - part.start


def _divmod(x: Index, y: int) -> tuple[Index, Index]:
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))
