"""Asynchronous copies in terms of whole arrays, for Pallas's interpreter."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.copies import Copies


@dataclasses.dataclass(frozen=True)
class ArrayCopies(Copies):
    """`AsyncCopies` without lanes: a chunk lands at its wait, and until then its slot holds NaN."""

    def start(self, i: Index, slot: Index) -> None:
        @pl.when((i >= 0) & (i < self.count))
        def _() -> None:
            for source in self.inputs:
                target = source.slots.at[slot]
                target[...] = jnp.full(target.shape, jnp.nan, target.dtype)

    def wait(self, i: Index, slot: Index, *, newer: int, stores: int | None = None) -> None:
        for source in self.inputs:
            source.slots.at[slot][...] = source.chunk(i)[...]

    def start_stores(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        for source, target in copies:
            target[...] = source[...]

    def wait_for_stores(self, stores: int = 0) -> None:
        pass
