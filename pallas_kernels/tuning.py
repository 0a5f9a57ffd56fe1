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
LARGEST_STATE = 4096
"""Most elements of state of a warpgroup that is made larger: 32 in a lane."""
MOST_STATE_HELD = MAX_HELD_AT_ONCE * 2048
"""Most elements of state that a multiprocessor holds in the forward kernel where it cannot hold
all: with more, warpgroups have fewer registers than they need."""
WAIT = 1.6
"""Time that passes before a multiprocessor has all of its work under way, in that which a warpgroup
of 32 columns adds to it: 1, 2, 3 and 5 of them take 0.70, 0.99, 1.23 and 1.87 ms, both ways, with
2048 steps and N = 32."""
SHARED = 0.85
"""Time of a column in a warpgroup made larger, where more of them share the loads of k and q."""
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
    batch: int, heads: int, n_state: int, n_value: int, n_sms: int, dtype: Any
) -> Geometry:
    """The geometry of the forward kernel for `B * H` states `[N, V]`."""
    smallest = _block(heads, n_value)
    larger = _larger(smallest, heads, n_value, columns=LARGEST_STATE // n_state)
    most = {x: max(1, MOST_STATE_HELD // (x[0] * x[1] * n_state)) for x in (smallest, *larger)}
    columns = batch * _padded_columns(heads, n_value, smallest)
    block, held = _fastest(smallest, most, columns, n_sms)
    chunks = (32, 16, 8) if block == smallest else (16, 8)
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
    smallest = _block(heads, n_value)
    most = {smallest: MAX_HELD_AT_ONCE}
    if smallest == (1, 32) and heads % 2 == 0 and _may_be_larger(n_state, dtype):
        most[2, 32] = 4
    columns = batch * _padded_columns(heads, n_value, smallest)
    block, held = _fastest(smallest, most, columns, n_sms)
    unroll, chunks = GROUP, (16, 8)
    # At most two warpgroups leave a multiprocessor waiting, and shared memory free.
    few = held <= 2 and block == smallest and n_state <= MANY_KEYS
    if n_state > MANY_KEYS:
        unroll, chunks = GROUP // 2, (8,)
    elif few:
        chunks = (32, 16, 8)
    # In float32 a block of several heads, each of which has its own keys, may not fit. With four,
    # registers spill at N = 56 and 120 if as many steps are written out.
    candidates = (
        Geometry(*b, chunk, unroll=unroll // 2 if b[0] == 4 else unroll, warpgroups=w, ahead=ahead)
        for b in (block, (1, column_multiple(1)))
        for w in range(held, 0, -1)
        for ahead in ((True, False) if few else (False,))
        for chunk in chunks
    )

    def needed(geometry: Geometry) -> int:
        return backward_shared_bytes(geometry, n_state, dtype, n_scalars, has_write_gate)

    return _first_that_fits(candidates, needed)


def _may_be_larger(n_state: int, dtype: Any) -> bool:
    """Where backward warpgroups of two heads can be faster; with 16 keys they were slower."""
    return 16 < n_state <= 32 and dtype == jnp.bfloat16


def _padded_columns(heads: int, n_value: int, block: tuple[int, int]) -> int:
    return round_up(heads, block[0]) * round_up(n_value, block[1])


def _block(heads: int, n_value: int) -> tuple[int, int]:
    """Heads and columns of a warpgroup of 32 columns: the least padding, then the fewest heads."""
    blocks = [(h, column_multiple(h)) for h in (1, 2, 4)]
    return min(blocks, key=lambda block: _padded_columns(heads, n_value, block))


def _larger(
    block: tuple[int, int], heads: int, n_value: int, columns: int
) -> list[tuple[int, int]]:
    """The block doubled, and again, to at most so many columns, while that pads nothing more."""
    padded = _padded_columns(heads, n_value, block)
    found = []
    while 2 * block[0] * block[1] <= columns:
        doubled = [(block[0] * 2, block[1])] if block[0] < 4 else []
        doubled.append((block[0], block[1] * 2))
        same = [b for b in doubled if _padded_columns(heads, n_value, b) == padded]
        if not same:
            break
        block = same[0]
        found.append(block)
    return found


def _fastest(
    smallest: tuple[int, int], most: dict[tuple[int, int], int], columns: int, n_sms: int
) -> tuple[tuple[int, int], int]:
    """The block, and the warpgroups of a thread block: the smallest while all are held at once,
    else those for which the last multiprocessor is done first; of equals the largest and most.

    Args:
        most: blocks, and how many warpgroups of each a thread block may have.
        columns: of the state, of all heads and rows.
    """

    def warpgroups(block: tuple[int, int]) -> int:
        return columns // (block[0] * block[1])

    per_sm = -(-warpgroups(smallest) // n_sms)
    if per_sm <= MAX_HELD_AT_ONCE:
        return smallest, max(1, per_sm)

    def time(choice: tuple[tuple[int, int], int]) -> float:
        block, held = choice
        in_turn = -(-warpgroups(block) // (held * n_sms))
        work = held * warpgroups(smallest) / warpgroups(block)
        return in_turn * (WAIT + work * (1 if block == smallest else SHARED))

    choices = [
        (block, held)
        for block, limit in most.items()
        for held in range(1, min(limit, MAX_HELD_AT_ONCE) + 1)
    ]
    return min(choices, key=lambda choice: (time(choice), warpgroups(choice[0]), -choice[1]))


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
