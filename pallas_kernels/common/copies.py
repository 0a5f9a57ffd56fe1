"""The pipeline of bulk copies (TMA): a block works on one chunk of time while the next one arrives.

Each input has a double buffer in shared memory; results leave through shared memory too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Barrier, Index, Interpret, Ref
from pallas_kernels.common.sizes import WARPS, round_up

SLOTS = 2
"""Chunks of an input in shared memory: a double buffer."""


@dataclasses.dataclass(frozen=True)
class Chunks:
    """T steps in chunks of `size`.

    Where `size` does not divide T, the last chunk starts early enough to be whole, overlaps the one
    before, and only its last rows count; of a single chunk, its first rows. Scalars and results do
    not overlap: theirs start at row 0.
    """

    time: int
    size: int

    @property
    def whole(self) -> int:
        return self.time // self.size

    @property
    def count(self) -> int:
        return -(-self.time // self.size)

    @property
    def last_rows(self) -> range:
        """The rows of the last chunk that count."""
        left_over = self.time - (self.count - 1) * self.size
        first = self.size - left_over if self.count > 1 else 0
        return range(first, first + left_over)

    def start(self, i: Index) -> Index:
        """The step in row 0 of chunk i."""
        return jnp.minimum(i * self.size, max(self.time - self.size, 0))


class Input(NamedTuple):
    """An array that arrives chunk by chunk."""

    chunk: Callable[[Index], Ref]
    """From i to chunk i in device memory."""
    slots: Ref
    """Double buffer in shared memory."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """Inputs that arrive together."""

    count: int  # chunks
    inputs: Sequence[Input]
    loaded: Barrier  # mbarriers, each of which expects an arrival from each input
    warpgroup: Index  # of the thread block
    interpret: Interpret

    def start(self, i: Index, slot: Index) -> None:
        """Starts the copy of chunk i, if there is one, to a slot that the block no longer reads."""

        @pl.when((i >= 0) & (i < self.count))
        def _() -> None:
            by_one_warp(lambda: self._start(i, slot), self.warpgroup, self.interpret)

    def _start(self, i: Index, slot: Index) -> None:
        for chunk, slots in self.inputs:
            plgpu.copy_gmem_to_smem(chunk(i), slots.at[slot], self._barrier(slot))

    def wait(self, slot: Index) -> None:
        """Waits until the chunk in this slot is there."""
        plgpu.barrier_wait(self._barrier(slot))

    def _barrier(self, slot: Index) -> Barrier:
        return self.loaded.at[self.warpgroup * SLOTS + slot]


def by_one_warp(copies: Callable[[], None], warpgroup: Index, interpret: Interpret) -> None:
    """Has one warp of a warpgroup issue the copies, to save the others the instructions.

    Neighbouring warpgroups take different warps, which are on different schedulers.
    """
    if interpret is not None:
        copies()
        return

    @plgpu.warp_map
    def _(warp: Index) -> None:
        pl.when(warp == lax.rem(jnp.int32(warpgroup), jnp.int32(WARPS)))(copies)


def scalars_per_copy(chunk: int) -> int:
    """Steps of scalars in one copy, which is a multiple of 128 bytes."""
    return round_up(chunk, 128 // 4)


def start_stores(copies: Sequence[tuple[Ref, Ref]], warpgroup: Index, interpret: Interpret) -> None:
    """Starts `(shared, device)` copies of what the block's warps have written.

    It is a barrier of the warpgroup: shared memory that a warp read before may be overwritten.
    """
    plgpu.commit_smem()

    def start() -> None:
        for source, target in copies:
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    by_one_warp(start, warpgroup, interpret)


def wait_for_stores(in_flight: int = 0) -> None:
    """Waits until at most the latest `in_flight` calls of `start_stores` still read shared memory.

    The warp that issued the copies waits for them, the others at the barrier that Pallas adds.
    """
    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
