"""How a block's inputs arrive, a chunk of time at a time, and its results leave: the interface.

A block works on one chunk while the next one arrives. Each input has a double buffer in shared
memory; results leave through shared memory too. `BulkCopies` and `AsyncCopies` implement it.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.common.aliases import Index, Ref

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
    """From i to chunk i in device memory, three axes."""
    slots: Ref
    """Double buffer in shared memory."""
    inside: Callable[[Index], tuple["Index | None", ...]]
    """From i to the elements of each axis of chunk i that the array has, from the first on; None
    for all. Zeros arrive in place of the others."""


@dataclasses.dataclass(frozen=True)
class Copies(abc.ABC):
    """The copies of a block: inputs that arrive together, and results."""

    count: int  # chunks
    inputs: Sequence[Input]

    @abc.abstractmethod
    def start(self, i: Index, slot: Index) -> None:
        """Starts the copy of chunk i, if there is one, to a slot that the block no longer reads."""

    @abc.abstractmethod
    def wait(self, i: Index, slot: Index, *, newer: int, stores: int | None = None) -> None:
        """Waits until chunk i is in this slot.

        Args:
            newer: calls of `start` since that of chunk i.
            stores: waits for stores too, as `wait_for_stores` does.
        """

    @abc.abstractmethod
    def start_stores(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        """Starts `(shared, device)` copies of what the block's warps have written.

        It is a barrier of the warpgroup: shared memory that a warp read before may be overwritten.
        """

    @abc.abstractmethod
    def wait_for_stores(self, stores: int = 0) -> None:
        """Waits until at most the latest `stores` calls of `start_stores` still read shared
        memory; a barrier of the warpgroup."""
