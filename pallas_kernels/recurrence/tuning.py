"""The tuning config that a kernel uses where the caller gives none: a few rules, from measurements.

They read B, H, N, V, the SMs of the target and the dtype; never T. `pallas_kernels/README.md` says
what they were measured on.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from pallas_kernels.common.launch import shared_bytes, shared_memory_limit
from pallas_kernels.common.sizes import round_up
from pallas_kernels.limits import SAVED_STATE_GROUP, UnsupportedError
from pallas_kernels.recurrence.scratch import backward_scratch, forward_scratch
from pallas_kernels.recurrence.tuning_config import (
    KEYS_MULTIPLE,
    STATES_HELD,
    TuningConfig,
    column_multiple,
)
from pallas_kernels.target import H100, Target

BlockSize: TypeAlias = tuple[int, int]
"""Heads of a block, and columns of each."""

MAX_HELD_AT_ONCE = 5
"""Most warpgroups of a thread block, to be held by one SM together."""
LARGEST_STATE = 4096
"""Most elements of state of an enlarged block: 32 per lane."""
MOST_STATE_HELD = MAX_HELD_AT_ONCE * 2048
"""Most elements of state that an SM holds in the forward kernel where it cannot hold all, and in
the backward kernel: with more, warpgroups have fewer registers than they need."""
WAIT = 1.6
"""Time before an SM has all of its warpgroups under way, in units of the time that a warpgroup of
32 columns adds: 1, 2, 3 and 5 of them take 0.70, 0.99, 1.23 and 1.87 ms, forward + backward, with
2048 steps and N = 32."""
SHARED = 0.85
"""Time of a column in an enlarged block, relative to the smallest: more columns share the loads of
k and q."""
HALVED = 1.1
"""Time of a column where states of half of a group lie in device memory. At A it is 1; 1.1 keeps
three warpgroups with all states at B as an A100, rather than four without, which were slower when
half of a group was replayed twice. To be measured again."""
MANY_KEYS = 96
"""Most keys at which 8 steps of the backward kernel are unrolled, rather than 4."""
MOST_SCALARS = 4
"""Scalars of a step of a call with every option: decay, write gate, document starts, row ends."""


def forward_shared_bytes(
    config: TuningConfig, n_state: int, dtype: Any, n_scalars: int = MOST_SCALARS
) -> int:
    """Shared memory of a thread block of the forward kernel, in bytes.

    Args:
        n_scalars: scalars of a step.
    """
    keys = round_up(n_state, KEYS_MULTIPLE)
    memory = forward_scratch(config, keys, n_scalars, dtype, save_delta=True)
    return shared_bytes(memory, config.warpgroups)


def backward_shared_bytes(
    config: TuningConfig,
    n_state: int,
    dtype: Any,
    n_scalars: int = MOST_SCALARS,
    has_write_gate: bool = True,
) -> int:
    """Shared memory of a thread block of the backward kernel, in bytes."""
    keys = round_up(n_state, KEYS_MULTIPLE)
    memory = backward_scratch(config, keys, n_scalars, has_write_gate, dtype)
    return shared_bytes(memory, config.warpgroups)


def forward_config(
    batch: int,
    heads: int,
    n_state: int,
    n_value: int,
    target: Target,
    dtype: Any,
    n_scalars: int = MOST_SCALARS,
) -> TuningConfig:
    """The config of the forward kernel for `B * H` states `[N, V]`.

    Raises:
        UnsupportedError: no config fits in the target's shared memory.
    """
    smallest = _block(heads, n_value)
    larger = _larger(smallest, heads, n_value, columns=LARGEST_STATE // n_state)
    most = {x: max(1, MOST_STATE_HELD // (x[0] * x[1] * n_state)) for x in (smallest, *larger)}
    columns = batch * _padded_columns(heads, n_value, smallest)
    block, held = _fastest(smallest, most, columns, target)
    chunks = (32, 16, 8) if block == smallest else (16, 8)
    candidates = (
        TuningConfig(*block, chunk=chunk, warpgroups=w, copies=copies(target))
        for w in range(held, 0, -1)
        for chunk in chunks
    )

    def needed(config: TuningConfig) -> int:
        return forward_shared_bytes(config, n_state, dtype, n_scalars)

    return _first_that_fits(candidates, needed, target)


def backward_config(
    batch: int,
    heads: int,
    n_state: int,
    n_value: int,
    target: Target,
    dtype: Any,
    n_scalars: int = MOST_SCALARS,
    has_write_gate: bool = True,
) -> TuningConfig:
    """The config of the backward kernel for `B * H` states `[N, V]`.

    Raises:
        UnsupportedError: no config fits in the target's shared memory.
    """
    smallest = _block(heads, n_value)
    most = {smallest: MAX_HELD_AT_ONCE}
    if smallest == (1, 32) and heads % 2 == 0 and _may_be_larger(n_state, dtype):
        most[2, 32] = 4
    columns = batch * _padded_columns(heads, n_value, smallest)
    block, held = _fastest(smallest, most, columns, target)
    chunks = 16, 8
    # One or two warpgroups leave an SM waiting, and shared memory free.
    few = held <= 2 and block == smallest and n_state <= MANY_KEYS
    if n_state > MANY_KEYS:
        chunks = (8,)
    elif few or copies(target) == "async":  # to which a chunk costs more
        chunks = (32, 16, 8)
    less_memory = target.has_less_shared_memory
    states_and_chunks = [(STATES_HELD[0], chunk) for chunk in chunks]
    halved = [(states, chunk) for chunk in chunks for states in STATES_HELD[1:]]
    # In float32 a block of several heads, each with keys of its own, may not fit.
    blocks = dict.fromkeys([block, *(most if less_memory else ()), (1, column_multiple(1))])
    candidates: Iterable[TuningConfig] = (
        TuningConfig(
            *b,
            chunk,
            unroll=unrolled_steps(n_state, b, states, dtype),
            warpgroups=w,
            pipelined=p,
            states_held=states,
            copies=copies(target),
        )
        for b in blocks
        for w in range(_most_held(b, n_state, most) if less_memory else held, 0, -1)
        for p in ((True, False) if few else (False,))
        for states, chunk in [*states_and_chunks, *(halved if less_memory and not p else ())]
    )
    if less_memory:

        def time(config: TuningConfig) -> float:
            own = config.heads, config.values
            columns = batch * _padded_columns(heads, n_value, own)
            of_column = HALVED if config.halved else 1.0
            return _time(config.warpgroups, columns, own, smallest, target, of_column)

        candidates = sorted(candidates, key=time)

    def needed(config: TuningConfig) -> int:
        return backward_shared_bytes(config, n_state, dtype, n_scalars, has_write_gate)

    return _first_that_fits(candidates, needed, target)


def unrolled_steps(n_state: int, block: BlockSize, states_held: int, dtype: Any) -> int:
    """Steps of the backward kernel that are unrolled: as many as registers and the cache of
    instructions allow."""
    steps = SAVED_STATE_GROUP // 2 if n_state > MANY_KEYS else SAVED_STATE_GROUP
    if block[0] == 4:  # else registers spill at N = 56 and 120
        steps //= 2
    if states_held == SAVED_STATE_GROUP:
        return steps
    # The code of a half is there twice, and long in float32: with 2 steps these kernels take 3 to
    # 10 % less time than with 4 up to N = 96, and half as much at N = 100 and 128.
    return min(steps, 4 if dtype == jnp.bfloat16 else 2)


def _most_held(block: BlockSize, n_state: int, most: dict[BlockSize, int]) -> int:
    """Most warpgroups of a thread block where shared memory does not limit them to fewer."""
    by_registers = MOST_STATE_HELD // (block[0] * block[1] * round_up(n_state, KEYS_MULTIPLE))
    return max(1, min(most.get(block, MAX_HELD_AT_ONCE), by_registers))


def copies(target: Target) -> Literal["bulk", "async"]:
    """`TuningConfig.copies` of a device."""
    return "bulk" if target.uses_bulk_copies else "async"


def _may_be_larger(n_state: int, dtype: Any) -> bool:
    """Whether backward blocks of two heads can be faster; with 16 keys they were slower."""
    return 16 < n_state <= 32 and dtype == jnp.bfloat16


def _padded_columns(heads: int, n_value: int, block: BlockSize) -> int:
    return round_up(heads, block[0]) * round_up(n_value, block[1])


def _block(heads: int, n_value: int) -> BlockSize:
    """The block of 32 columns with the least padding, then the fewest heads."""
    blocks = [(h, column_multiple(h)) for h in (1, 2, 4)]
    return min(blocks, key=lambda block: _padded_columns(heads, n_value, block))


def _larger(block: BlockSize, heads: int, n_value: int, columns: int) -> list[BlockSize]:
    """The block doubled, and again, up to so many columns, while that pads nothing more."""
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
    smallest: BlockSize, most: dict[BlockSize, int], columns: int, target: Target
) -> tuple[BlockSize, int]:
    """The block, and the warpgroups of a thread block.

    The smallest block while all are held at once, else the one for which the last SM finishes
    first; of equals the largest block and most warpgroups.

    Args:
        most: most warpgroups of a thread block, for each block.
        columns: columns of the state, of all heads and rows.
        target: its number of SMs counts; the H100's where unknown.
    """
    per_sm = -(-_warpgroups(columns, smallest) // _n_sms(target))
    if per_sm <= MAX_HELD_AT_ONCE:
        return smallest, max(1, per_sm)

    def time(choice: tuple[BlockSize, int]) -> float:
        block, held = choice
        return _time(held, columns, block, smallest, target)

    choices = [
        (block, held)
        for block, limit in most.items()
        for held in range(1, min(limit, MAX_HELD_AT_ONCE) + 1)
    ]
    return min(
        choices, key=lambda choice: (time(choice), _warpgroups(columns, choice[0]), -choice[1])
    )


def _time(
    held: int,
    columns: int,
    block: BlockSize,
    smallest: BlockSize,
    target: Target,
    of_column: float = 1.0,
) -> float:
    """Time until the last SM finishes, as `WAIT` counts it, `of_column` that of a column."""
    in_turn = -(-_warpgroups(columns, block) // (held * _n_sms(target)))
    work = held * block[0] * block[1] / (smallest[0] * smallest[1])
    return in_turn * (WAIT + work * of_column * (1 if block == smallest else SHARED))


def _warpgroups(columns: int, block: BlockSize) -> int:
    return columns // (block[0] * block[1])


def _n_sms(target: Target) -> int:
    n_sms = target.n_sms or H100.n_sms
    assert n_sms is not None
    return n_sms


def _first_that_fits(
    candidates: Iterable[TuningConfig], needed: Callable[[TuningConfig], int], target: Target
) -> TuningConfig:
    limit = shared_memory_limit(target)
    smallest: TuningConfig | None = None
    for config in candidates:
        if needed(config) <= limit:
            return config
        smallest = config
    assert smallest is not None
    raise UnsupportedError(
        f"needs {needed(smallest)} bytes of shared memory, of {limit}, even in {smallest}"
    )


def neighbours(config: TuningConfig) -> list[TuningConfig]:
    """Valid configs that differ from this one in one number: the next candidates of a search."""
    changes: list[dict[str, Any]] = [
        *({"heads": h} for h in (1, 2, 4)),
        *({"values": v} for v in (config.values // 2, config.values * 2)),
        *({"chunk": c} for c in (config.chunk // 2, config.chunk * 2)),
        *({"unroll": u} for u in (1, 2, 4, 8)),
        *({"warpgroups": w} for w in (config.warpgroups - 1, config.warpgroups + 1)),
        {"pipelined": not config.pipelined},
        *({"states_held": states} for states in STATES_HELD),
        {"copies": "async" if config.copies == "bulk" else "bulk"},
    ]
    found = []
    for change in changes:
        try:
            candidate = dataclasses.replace(config, **change)
        except ValueError:
            continue
        if candidate != config:
            found.append(candidate)
    return found
