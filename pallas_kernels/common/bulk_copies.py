"""Bulk copies (TMA), of Hopper and later: one warp starts them, and they arrive at an mbarrier."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Barrier, Index, Interpret, Ref
from pallas_kernels.common.copies import SLOTS, Copies
from pallas_kernels.common.sizes import WARPS


@dataclasses.dataclass(frozen=True)
class BulkCopies(Copies):
    """Copies by the copy engine, which reads zeros past the end of an array."""

    loaded: Barrier  # mbarriers, each of which expects an arrival from each input
    warpgroup: Index  # of the thread block
    interpret: Interpret

    def start(self, i: Index, slot: Index) -> None:
        @pl.when((i >= 0) & (i < self.count))
        def _() -> None:
            self._by_one_warp(lambda: self._start(i, slot))

    def _start(self, i: Index, slot: Index) -> None:
        for source in self.inputs:
            plgpu.copy_gmem_to_smem(source.chunk(i), source.slots.at[slot], self._barrier(slot))

    def wait(self, i: Index, slot: Index, *, newer: int, stores: int | None = None) -> None:
        plgpu.barrier_wait(self._barrier(slot))
        if stores is not None:
            self.wait_for_stores(stores)

    def start_stores(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        plgpu.commit_smem()

        def start() -> None:
            for source, target in copies:
                plgpu.copy_smem_to_gmem(source, target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        self._by_one_warp(start)

    def wait_for_stores(self, stores: int = 0) -> None:
        # The warp that issued the copies waits, the others at the barrier that Pallas adds.
        plgpu.wait_smem_to_gmem(stores, wait_read_only=True)

    def _barrier(self, slot: Index) -> Barrier:
        return self.loaded.at[self.warpgroup * SLOTS + slot]

    def _by_one_warp(self, copies: Callable[[], None]) -> None:
        """Has one warp of a warpgroup issue the copies, to save the others the instructions.

        Neighbouring warpgroups take different warps, which are on different schedulers.
        """
        if self.interpret is not None:
            copies()
            return

        @plgpu.warp_map
        def _(warp: Index) -> None:
            pl.when(warp == lax.rem(jnp.int32(self.warpgroup), jnp.int32(WARPS)))(copies)
