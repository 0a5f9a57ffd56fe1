"""Asynchronous copies (`cp.async`), of Ampere and later: every lane copies 16 bytes at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.copies import Copies
from pallas_kernels.common.copy_lanes import copy_in, copy_out
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.mosaic import inline


@dataclasses.dataclass(frozen=True)
class AsyncCopies(Copies):
    """Copies by the block's lanes. Results are copied at once: the next barrier frees their shared
    memory."""

    def start(self, i: Index, slot: Index) -> None:
        @pl.when((i >= 0) & (i < self.count))
        def _() -> None:
            for source in self.inputs:
                _start(source.chunk(i), source.slots.at[slot], source.inside(i))

        # Also where nothing was started: `wait` counts groups.
        inline(lambda _: LaneOps().end_of_copies())

    def wait(self, i: Index, slot: Index, *, newer: int, stores: int | None = None) -> None:
        inline(lambda _: LaneOps().wait_for_copies(newer))
        self.wait_for_stores()

    def start_stores(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        def emit(_: Any, *refs: Ref) -> None:
            w, memory = LaneOps(), [Memory(ref) for ref in refs]
            w.synchronize()
            for source, target in zip(memory[::2], memory[1::2], strict=True):
                copy_out(w, source, target)

        refs = [ref for pair in copies for ref in pair]
        inline(emit, *refs, arg_types=(plgpu.RefType(),) * len(refs))

    def wait_for_stores(self, stores: int = 0) -> None:
        inline(lambda _: LaneOps().synchronize())


def _start(source: Ref, target: Ref, inside: tuple[Index | None, ...]) -> None:
    limits = [limit for limit in inside if limit is not None]

    def emit(_: Any, source: Ref, target: Ref, *limits: Any) -> None:
        own = (limit.registers.item() for limit in limits)
        of_axes = [None if limit is None else next(own) for limit in inside]
        copy_in(LaneOps(), Memory(source), Memory(target), of_axes)

    types = (plgpu.RefType(),) * 2 + (plgpu.Layout.WG_SPLAT(()),) * len(limits)
    inline(emit, source, target, *limits, arg_types=types)
