"""Block geometry: how the work is cut up, as data."""

import dataclasses

from pallas_kernels.layouts import COLUMN_LANES, WARPS, Registers


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a kernel cuts up the heads, the columns of the state and time.

    A block of 4 warps takes `heads` heads (1, 2 or 4) and `values` columns of each (a multiple of
    32 / heads); time goes by in chunks of `chunk` steps (a multiple of 8).
    """

    heads: int
    values: int
    chunk: int
    unroll: int = 4

    def __post_init__(self) -> None:
        if self.heads not in (1, 2, 4):
            raise ValueError(f"a block has 1, 2 or 4 heads, got {self.heads}.")
        multiple = COLUMN_LANES * WARPS // self.heads
        if self.values < 1 or self.values % multiple:
            raise ValueError(
                f"a block of {self.heads} heads has a multiple of {multiple} columns of each, "
                f"got {self.values}."
            )
        if self.chunk < 1 or self.chunk % 8:
            raise ValueError(f"a chunk has a multiple of 8 steps, got {self.chunk}.")

    def registers(self, keys: int, interpret: bool) -> Registers:
        return Registers(self.heads, self.values, keys, interpret)

    def unroll_of(self, steps: int) -> int:
        return self.unroll if steps % self.unroll == 0 else 1
