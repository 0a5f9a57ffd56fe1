"""Block geometry: how a kernel cuts up the work, as data."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.layouts import COLUMN_LANES, WARPS, Registers

KEYS_MULTIPLE = 16
"""What a kernel's N is a multiple of."""
GROUP = 8
"""Steps that the backward kernel replays at once, from the state that was kept before them. A chunk
has whole groups; copies to shared memory are multiples of 128 bytes, so 8 steps or more."""
MAX_WARPGROUPS = 8


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


class Sizes(NamedTuple):
    """Of a state in the kernels, padding and all."""

    heads: int
    values: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a kernel cuts up the heads, the columns of the state and time.

    Attributes:
        heads: heads of a warpgroup of 4 warps: 1, 2 or 4.
        values: columns of each of these heads: a multiple of `32 / heads`.
        chunk: steps that are copied to shared memory at once, a multiple of 8.
        unroll: steps forward, and replayed, that are written out in a row where it divides their
            number.
        warpgroups: warpgroups of a thread block. They are independent, but a thread block of w of
            them may use 65,536 / (128 w) registers per thread: w caps the registers, and so says
            how many warpgroups a multiprocessor holds.
        ahead: whether the backward kernel replays each group of steps while it walks back the group
            after it, so that each fills the waits of the other; the states of two groups are in
            shared memory then.
    """

    heads: int
    values: int
    chunk: int
    unroll: int = 4
    warpgroups: int = 1
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.heads not in (1, 2, 4):
            raise ValueError(f"a warpgroup has 1, 2 or 4 heads, got {self.heads}.")
        multiple = column_multiple(self.heads)
        if self.values < 1 or self.values % multiple:
            raise ValueError(
                f"a warpgroup of {self.heads} heads has a multiple of {multiple} columns of each, "
                f"got {self.values}."
            )
        if self.chunk < 1 or self.chunk % GROUP:
            raise ValueError(f"a chunk has a multiple of {GROUP} steps, got {self.chunk}.")
        if self.unroll < 1:
            raise ValueError(f"unroll must be at least 1 step, got {self.unroll}.")
        if not 1 <= self.warpgroups <= MAX_WARPGROUPS:
            raise ValueError(
                f"a thread block has 1 to {MAX_WARPGROUPS} warpgroups, got {self.warpgroups}."
            )

    def registers(self, keys: int, dtype: Any, interpret: bool) -> Registers:
        return Registers(self.heads, self.values, keys, jnp.dtype(dtype).itemsize, interpret)

    def padded(self, heads: int, n_value: int, n_state: int) -> Sizes:
        """The sizes that whole blocks have together."""
        return Sizes(
            round_up(heads, self.heads),
            round_up(n_value, self.values),
            round_up(n_state, KEYS_MULTIPLE),
        )

    def blocks(self, sizes: Sizes) -> int:
        """Of a row of the batch."""
        return (sizes.heads // self.heads) * (sizes.values // self.values)

    def unroll_of(self, steps: int) -> int:
        return self.unroll if steps % self.unroll == 0 else 1


def column_multiple(heads: int) -> int:
    """What the columns of each head are a multiple of in a warpgroup of so many heads."""
    return COLUMN_LANES * WARPS // heads
