"""Sizes of a warpgroup, and rounding up. Imports no JAX."""

WARPS = 4
"""Warps of a warpgroup."""
LANES = 32
"""Lanes of a warp."""
THREADS = LANES * WARPS


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
