"""Sizes of a warpgroup, and rounding up. Imports no JAX."""

WARPS = 4
"""Warps of a warpgroup."""
LANES = 32
"""Lanes of a warp."""
THREADS = LANES * WARPS
REGISTERS = 65_536
"""Registers of an SM, from compute capability 8.0 to 12.x. Source: CUDA C++ Programming Guide,
technical specifications."""
MAX_REGISTERS = 255
"""Registers of a thread at most. Source: the same."""


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
