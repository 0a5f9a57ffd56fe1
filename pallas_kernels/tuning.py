"""The geometry that a kernel uses where the caller gives none: a few rules, from measurements.

They read the number of heads, N, V, the number of multiprocessors and the dtype; never T. What they
were measured on, and what they leave on the table, is in this folder's README.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels import backward, forward
from pallas_kernels.blocks import MAX_SHARED_BYTES, shared_bytes
from pallas_kernels.geometry import GROUP, KEYS_MULTIPLE, Geometry, column_multiple, round_up

MAX_HELD_AT_ONCE = 5
"""Most warpgroups that are put side by side to be held by one multiprocessor together."""
MANY = 8
"""Warpgroups per multiprocessor from which fewer and larger ones are faster, in the forward kernel
always: the loads of k and q are shared by more columns, and there are enough to hide latency behind
each other."""
LARGEST_STATE = 4096
"""Most elements of state of a warpgroup that is made larger: 32 in a lane."""
MANY_KEYS = 96
"""Most keys at which 8 steps of the backward kernel are written out in a row, rather than 4."""
MOST_SCALARS = 3


def forward_shared_bytes(
    geometry: Geometry, n_state: int, dtype: Any, n_scalars: int = MOST_SCALARS
) -> int:
    """Shared memory of a thread block of the forward kernel, in bytes.

    Args:
        n_scalars: arrays of scalars that a step reads: decay, the write gate, document starts.
    """
    keys = round_up(n_state, KEYS_MULTIPLE)
    return shared_bytes(
        forward.scratch(geometry, keys, n_scalars, dtype, keep_errors=True), geometry.warpgroups
    )


def backward_shared_bytes(
    geometry: Geometry,
    n_state: int,
    dtype: Any,
    n_scalars: int = MOST_SCALARS,
    has_write_gate: bool = True,
) -> int:
    """Shared memory of a thread block of the backward kernel, in bytes."""
    keys = round_up(n_state, KEYS_MULTIPLE)
    memory = backward.scratch(geometry, keys, n_scalars, has_write_gate, dtype)
    return shared_bytes(memory, geometry.warpgroups)


def forward_geometry(
    batch: int,
    heads: int,
    n_state: int,
    n_value: int,
    n_sms: int,
    dtype: Any,
    keeps_groups: bool = False,
) -> Geometry:
    """The geometry of the forward kernel for `B * H` states `[N, V]`.

    Args:
        keeps_groups: whether it keeps the state before each group of steps.
    """
    block = _block(heads, n_value)
    per_sm = _warpgroups(batch, heads, n_value, block) / n_sms
    if per_sm >= MANY:
        block = _larger(block, heads, n_value, columns=LARGEST_STATE // n_state)
        held, chunks = 2, (16, 8)
    else:
        held, chunks = _held_at_once(per_sm), (32, 16, 8)
    if keeps_groups:
        chunks = (GROUP,)  # as measured; longer ones were not
    candidates = (
        Geometry(*block, chunk=chunk, warpgroups=w) for w in range(held, 0, -1) for chunk in chunks
    )
    return _first_that_fits(candidates, lambda g: forward_shared_bytes(g, n_state, dtype))


def backward_geometry(
    batch: int,
    heads: int,
    n_state: int,
    n_value: int,
    n_sms: int,
    dtype: Any,
    n_scalars: int = MOST_SCALARS,
    has_write_gate: bool = True,
) -> Geometry:
    """The geometry of the backward kernel for `B * H` states `[N, V]`."""
    block = _block(heads, n_value)
    per_sm = _warpgroups(batch, heads, n_value, block) / n_sms
    held = _held_at_once(per_sm)
    if per_sm >= MANY and block == (1, 32) and heads % 2 == 0 and _may_be_larger(n_state, dtype):
        block, held = (2, 32), 4
    unroll, chunks = GROUP, (16, 8)
    if n_state > MANY_KEYS:
        unroll, chunks = GROUP // 2, (8,)
    elif per_sm <= 1:
        # One warpgroup has a multiprocessor to itself: nothing to save shared memory for.
        chunks = (32, 16, 8)
    # In float32 a block of several heads, each of which has its own keys, may not fit. With four,
    # registers spill at N = 56 and 120 if as many steps are written out.
    candidates = (
        Geometry(*b, chunk=chunk, unroll=unroll // 2 if b[0] == 4 else unroll, warpgroups=w)
        for b in (block, (1, column_multiple(1)))
        for w in range(held, 0, -1)
        for chunk in chunks
    )

    def needed(geometry: Geometry) -> int:
        return backward_shared_bytes(geometry, n_state, dtype, n_scalars, has_write_gate)

    return _first_that_fits(candidates, needed)


def _may_be_larger(n_state: int, dtype: Any) -> bool:
    """Where backward warpgroups of two heads were faster; with 16 keys they were slower."""
    return 16 < n_state <= 32 and dtype == jnp.bfloat16


def _padded_columns(heads: int, n_value: int, block: tuple[int, int]) -> int:
    return round_up(heads, block[0]) * round_up(n_value, block[1])


def _block(heads: int, n_value: int) -> tuple[int, int]:
    """Heads and columns of a warpgroup of 32 columns: the least padding, then the fewest heads."""
    blocks = [(h, column_multiple(h)) for h in (1, 2, 4)]
    return min(blocks, key=lambda block: _padded_columns(heads, n_value, block))


def _larger(block: tuple[int, int], heads: int, n_value: int, columns: int) -> tuple[int, int]:
    """The block doubled to at most so many columns, as long as that pads nothing more."""
    padded = _padded_columns(heads, n_value, block)
    while 2 * block[0] * block[1] <= columns:
        doubled = [(block[0] * 2, block[1])] if block[0] < 4 else []
        doubled.append((block[0], block[1] * 2))
        same = [b for b in doubled if _padded_columns(heads, n_value, b) == padded]
        if not same:
            break
        block = same[0]
    return block


def _warpgroups(batch: int, heads: int, n_value: int, block: tuple[int, int]) -> float:
    return batch * _padded_columns(heads, n_value, block) / (block[0] * block[1])


def _held_at_once(per_sm: float) -> int:
    """Warpgroups that a multiprocessor should hold for all of them to run at once."""
    return min(max(1, -int(-per_sm // 1)), MAX_HELD_AT_ONCE)


def _first_that_fits(candidates: Any, needed: Callable[[Geometry], int]) -> Geometry:
    smallest: Geometry | None = None
    for geometry in candidates:
        if needed(geometry) <= MAX_SHARED_BYTES:
            return geometry
        smallest = geometry
    assert smallest is not None
    raise NotImplementedError(
        f"needs {needed(smallest)} bytes of shared memory, of {MAX_SHARED_BYTES}, even in "
        f"{smallest}."
    )


def neighbours(geometry: Geometry) -> list[Geometry]:
    """Valid geometries that differ from this one in one number: what a search tries next."""
    changes: list[dict[str, Any]] = [
        *({"heads": h} for h in (1, 2, 4)),
        *({"values": v} for v in (geometry.values // 2, geometry.values * 2)),
        *({"chunk": c} for c in (geometry.chunk // 2, geometry.chunk * 2)),
        *({"unroll": u} for u in (1, 2, 4, 8)),
        *({"warpgroups": w} for w in (geometry.warpgroups - 1, geometry.warpgroups + 1)),
        {"ahead": not geometry.ahead},
    ]
    found = []
    for change in changes:
        try:
            candidate = dataclasses.replace(geometry, **change)
        except ValueError:
            continue
        if candidate != geometry:
            found.append(candidate)
    return found
