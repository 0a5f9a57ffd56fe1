"""Block geometry: how the work is cut up, as data."""

import dataclasses
from typing import Any

import jax.numpy as jnp

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
    history: int = 4
    warpgroups: int = 1

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

    def registers(self, keys: int, dtype: Any, interpret: bool) -> Registers:
        return Registers(self.heads, self.values, keys, jnp.dtype(dtype).itemsize, interpret)

    def unroll_of(self, steps: int) -> int:
        return self.unroll if steps % self.unroll == 0 else 1


KEYS_MULTIPLE = 8
"""What a kernel's N is a multiple of."""
CHUNK_MULTIPLE = 16
"""What the chunks of the heuristics divide, whatever the call: checkpoints lie this far apart or a
multiple of it, so that shards of one program agree on where."""


def _block(n_value: int) -> tuple[int, int]:
    """Heads and columns of a block: the fewest columns of padding, then the fewest heads."""
    blocks = [(heads, COLUMN_LANES * WARPS // heads) for heads in (1, 2, 4)]
    return min(blocks, key=lambda block: -(-n_value // block[1]) * block[1])


def forward_geometry(
    batch_heads: int, n_state: int, n_value: int, n_sms: int, dtype: Any
) -> Geometry:
    """The geometry of the forward kernel for B * H heads of `[N, V]`; never depends on T."""
    del batch_heads, n_state, n_sms, dtype
    heads, values = _block(n_value)
    return Geometry(heads, values, chunk=16)


def backward_geometry(
    batch_heads: int, n_state: int, n_value: int, n_sms: int, dtype: Any
) -> Geometry:
    """The geometry of the backward kernel for B * H heads of `[N, V]`; never depends on T."""
    del batch_heads, n_state, n_sms
    # In float32, sums over columns are taken in registers, where they cannot cross warps.
    heads, values = (4, 8) if dtype == jnp.float32 else _block(n_value)
    return Geometry(heads, values, chunk=8)
