"""The tuning config of a kernel: blocks of heads and columns, chunks of time."""

import dataclasses
from typing import Literal, NamedTuple

from pallas_kernels.common.sizes import MAX_REGISTERS, REGISTERS, THREADS, WARPS, round_up
from pallas_kernels.limits import SAVED_STATE_GROUP

KEYS_MULTIPLE = 16
"""N is padded to a multiple of it: one mma of 16 rows."""
COLUMN_LANES = 8
"""Lanes of a warp side by side on neighbouring columns; the others split the keys of each."""
KEY_LANES = 4
STATES_HELD = SAVED_STATE_GROUP, SAVED_STATE_GROUP // 2, SAVED_STATE_GROUP // 2 - 1
REGISTERS_PER_ELEMENT = 9
"""Registers of a lane for each element of the state that it holds, below which it is short of them.
With 6 (N = 64, five warpgroups an SM) the backward pass is 4 % faster if the next saved state is
loaded late; with 8 it is 3 % faster to 3 % slower, and spills half as much or less."""
MAX_WARPGROUPS = 8
"""Most warpgroups of a thread block: 1024 threads."""


class PaddedSizes(NamedTuple):
    """Sizes of a state in the kernels, padding included."""

    heads: int
    values: int
    keys: int


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a kernel divides heads, columns of the state and time.

    Attributes:
        heads: heads of a block, which is one warpgroup: 1, 2 or 4.
        values: columns of each of these heads, a multiple of `32 / heads`.
        chunk: steps of a copy to shared memory, a multiple of 8.
        unroll: steps unrolled, forward and replayed, where it divides their number.
        warpgroups: warpgroups of a thread block. They are independent, but a thread block of w of
            them may use 65,536 / (128 w) registers per thread: w caps the registers, and so sets
            how many warpgroups an SM holds.
        pipelined: whether the backward kernel replays each group of steps while it backpropagates
            through the group after it (software pipelining), so that each hides the latency of the
            other; shared memory then holds the states of two groups.
        states_held: states of a group that the backward kernel has in shared memory: all 8; 4,
            those of the second half, where those of the first lie in device memory, which the
            level-2 cache is to hold; or 3, where the one in the middle stays in registers. Only 8
            with `pipelined`.
        copies: how data moves between device and shared memory: by bulk copies, from compute
            capability 9.0 on, or by the lanes' asynchronous ones (`cp.async`).
    """

    heads: int
    values: int
    chunk: int
    unroll: int = 4
    warpgroups: int = 1
    pipelined: bool = False
    states_held: int = SAVED_STATE_GROUP
    copies: Literal["bulk", "async"] = "bulk"

    def __post_init__(self) -> None:
        if self.heads not in (1, 2, 4):
            raise ValueError(f"a warpgroup has 1, 2 or 4 heads, got {self.heads}.")
        multiple = column_multiple(self.heads)
        if self.values < 1 or self.values % multiple:
            raise ValueError(
                f"a warpgroup of {self.heads} heads has a multiple of {multiple} columns of each, "
                f"got {self.values}."
            )
        if self.chunk < 1 or self.chunk % SAVED_STATE_GROUP:
            raise ValueError(
                f"a chunk has a multiple of {SAVED_STATE_GROUP} steps, got {self.chunk}."
            )
        if self.unroll < 1:
            raise ValueError(f"unroll must be at least 1 step, got {self.unroll}.")
        if not 1 <= self.warpgroups <= MAX_WARPGROUPS:
            raise ValueError(
                f"a thread block has 1 to {MAX_WARPGROUPS} warpgroups, got {self.warpgroups}."
            )

        if self.states_held not in STATES_HELD:
            raise ValueError(f"states_held must be 3, 4 or 8, got {self.states_held}.")
        if self.pipelined and self.states_held != SAVED_STATE_GROUP:
            raise ValueError(f"pipelined blocks hold 8 states of a group, got {self.states_held}.")

    @property
    def result_slots(self) -> int:
        """Chunks of a result in shared memory: bulk copies still read one while the next is
        written."""
        return 2 if self.copies == "bulk" else 1

    @property
    def in_place(self) -> bool:
        """Whether the backward kernel's results take the place of its inputs in shared memory.

        Bulk copies still read results when the next inputs arrive, and pipelined blocks write
        results late.
        """
        return self.copies == "async" and not self.pipelined

    @property
    def scalar_steps(self) -> int:
        """Steps of scalars in one copy: those of a bulk copy are a multiple of 128 bytes."""
        return round_up(self.chunk, 128 // 4) if self.copies == "bulk" else self.chunk

    @property
    def halved(self) -> bool:
        """Whether states of the first half of a group are not held in shared memory."""
        return self.states_held < SAVED_STATE_GROUP

    @property
    def first_in_registers(self) -> bool:
        """Whether the first state of the second half is not held in shared memory either."""
        return self.states_held < SAVED_STATE_GROUP // 2

    def registers_per_element(self, keys: int) -> float:
        """Registers of a lane for each element that it holds of states of so many keys."""
        elements = self.heads * self.values * keys / THREADS
        return min(MAX_REGISTERS, REGISTERS / (THREADS * self.warpgroups)) / elements

    def is_short_of_registers(self, keys: int) -> bool:
        """Whether a halved block of so many keys had better load and compute again than keep."""
        return self.halved and self.registers_per_element(keys) < REGISTERS_PER_ELEMENT

    def padded(self, heads: int, n_value: int, n_state: int) -> PaddedSizes:
        """The sizes of a state in whole blocks."""
        return PaddedSizes(
            round_up(heads, self.heads),
            round_up(n_value, self.values),
            round_up(n_state, KEYS_MULTIPLE),
        )

    def blocks(self, sizes: PaddedSizes) -> int:
        """Blocks per row of the batch."""
        return (sizes.heads // self.heads) * (sizes.values // self.values)

    def unroll_of(self, steps: int) -> int:
        return self.unroll if steps % self.unroll == 0 else 1


def column_multiple(heads: int) -> int:
    """Multiple of columns per head in a warpgroup of so many heads."""
    return COLUMN_LANES * WARPS // heads
