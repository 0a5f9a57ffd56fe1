"""The tuning config that a kernel uses where the caller gives none: a few rules, from measurements.

They read B, H, N, V, the SMs of the target and the dtype; never T. `pallas_kernels/README.md` says
what they were measured on.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from pallas_kernels.common.launch import shared_bytes, shared_memory_limit, thread_blocks
from pallas_kernels.common.sizes import round_up
from pallas_kernels.limits import SAVED_STATE_GROUP, UnsupportedError
from pallas_kernels.recurrence.scratch import backward_scratch, forward_scratch
from pallas_kernels.recurrence.tuning_config import (
    KEYS_MULTIPLE,
    REGISTERS_PER_ELEMENT,
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
WAIT_OF_STEP, WAIT_OF_KEYS = 0.35, 40
"""The same of the backward kernel by N, as `WAIT_OF_STEP + WAIT_OF_KEYS / N`: a step waits about as
long at every N, while a warpgroup's work grows with it. The kernels of `MISSING_REGISTER` took 1.1
with N = 48, 0.95 with 64, 0.7 with 96 and 0.8 with 128."""
SHARED = 0.85
"""Time of a column in an enlarged block, relative to the smallest: more columns share the loads of
k and q."""
HALVED = 1.05
"""Time of a column where states of half of a group lie in device memory: at N = 48 and 64 with one
to four warpgroups 0.95 to 1.07, at N = 32 with five 0.97, at N = 96 and 128 with one or two 0.95
to 1.2."""
MISSING_REGISTER = 0.06
"""Time that each register less than `REGISTERS_PER_ELEMENT` adds to a column's: beyond the line
through two and three warpgroups, or one and two, N = 48 with 8.5 takes 1.06 times as long, N = 64
with 8 and 6.4 1.12 and 1.18 times, N = 96 with 7.1 1.12 times. With 60 warpgroups for each SM of an
H100 and 256 steps, forward + backward less forward."""
TWO_THREAD_BLOCKS = 0.95
"""Time of two thread blocks of one warpgroup on an SM, relative to one of two: neither waits for
the other to end. With 60 warpgroups for each SM 0.86 to 1.01 from N = 48 to 96, 0.91 to 1.01 at
N = 128."""
MANY_KEYS = 96
"""Most keys at which 8 steps of the backward kernel are unrolled, rather than 4."""
MOST_KEYS_OF_TWO_STEPS = 112
"""Most keys at which 2 steps of a halved block in float32 are unrolled, rather than 1: at N = 112
one takes 15 to 31 % longer without options and 2 to 6 % less time with all, at 120 and 128 26 to
31 % less where an SM holds two blocks, and 3 to 4 % less where it holds one."""
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
    keys = round_up(n_state, KEYS_MULTIPLE)
    smallest, one_head = _block(heads, n_value), (1, column_multiple(1))

    def warpgroups(block: BlockSize) -> int:
        return batch * _padded_columns(heads, n_value, block) // math.prod(block)

    def needed(config: TuningConfig) -> int:
        return backward_shared_bytes(config, n_state, dtype, n_scalars, has_write_gate)

    def time(config: TuningConfig) -> float:
        block = config.heads, config.values
        missing = max(0.0, REGISTERS_PER_ELEMENT - config.registers_per_element(keys))
        work = _work(block, one_head) * (1 + MISSING_REGISTER * missing)
        if config.halved:
            work *= HALVED
        wait = WAIT_OF_STEP + WAIT_OF_KEYS / keys
        # Threads have 255 registers at most: those of an SM are enough for two such thread blocks.
        if config.warpgroups == 1 and per_sm > 2 and thread_blocks(needed(config), target) > 1:
            return TWO_THREAD_BLOCKS * _time(2, warpgroups(block), work, wait, target)
        return _time(config.warpgroups, warpgroups(block), work, wait, target)

    per_sm = -(-warpgroups(smallest) // _n_sms(target))
    # One or two warpgroups leave an SM waiting, and shared memory free.
    few = per_sm <= 2 and n_state <= MANY_KEYS
    blocks = [smallest, one_head]  # several heads may pad less, and not fit
    if per_sm > MAX_HELD_AT_ONCE and _may_be_doubled(smallest, heads, n_state, dtype):
        blocks = [(2 * smallest[0], smallest[1]), smallest]

    def order(config: TuningConfig) -> tuple[float, bool, bool]:
        # Pipelined blocks take 12 to 14 % longer with chunks of 8 steps than of 16.
        return time(config), not config.pipelined, few and config.chunk < 16

    candidates = _backward_candidates(blocks, few, n_state, dtype, target)
    return _first_that_fits(sorted(candidates, key=order), needed, target)


def _backward_candidates(
    blocks: Iterable[BlockSize], few: bool, n_state: int, dtype: Any, target: Target
) -> Iterator[TuningConfig]:
    """Configs of the backward kernel; of equally fast ones the first is to be taken."""
    chunks = (32, 16, 8)
    if n_state > MANY_KEYS:
        chunks = (8,)
    elif not few and copies(target) == "bulk":  # with cp.async a chunk costs more
        chunks = (16, 8)
    ways = [(True, STATES_HELD[:1]), (False, STATES_HELD)] if few else [(False, STATES_HELD)]
    for block in dict.fromkeys(blocks):
        for warpgroups in range(_most_held(block, round_up(n_state, KEYS_MULTIPLE)), 0, -1):
            for (pipelined, states), chunk in itertools.product(ways, chunks):
                for held in states:
                    yield TuningConfig(
                        *block,
                        chunk,
                        unroll=unrolled_steps(n_state, block, held, dtype),
                        warpgroups=warpgroups,
                        pipelined=pipelined,
                        states_held=held,
                        copies=copies(target),
                    )


def unrolled_steps(n_state: int, block: BlockSize, states_held: int, dtype: Any) -> int:
    """Steps of the backward kernel that are unrolled: as many as registers and the cache of
    instructions allow."""
    halved = states_held < SAVED_STATE_GROUP
    if halved and dtype == jnp.float32:  # long, and the code of a half is there twice
        return 2 if n_state <= MOST_KEYS_OF_TWO_STEPS else 1
    steps = SAVED_STATE_GROUP // 2 if n_state > MANY_KEYS else SAVED_STATE_GROUP
    if block[0] == 4:  # else registers spill at N = 56 and 120
        steps //= 2
    return min(steps, SAVED_STATE_GROUP // 2) if halved else steps


def _most_held(block: BlockSize, keys: int) -> int:
    """Most warpgroups of a thread block where shared memory does not limit them to fewer."""
    # Five of four heads spill 204 bytes at N = 56, and take 2 % longer than three.
    state_held = MOST_STATE_HELD * 9 // 10 if block[0] > 1 else MOST_STATE_HELD
    by_registers = state_held // (math.prod(block) * keys)
    return max(1, min(MAX_HELD_AT_ONCE, by_registers))


def copies(target: Target) -> Literal["bulk", "async"]:
    """`TuningConfig.copies` of a device."""
    return "bulk" if target.uses_bulk_copies else "async"


def _may_be_doubled(block: BlockSize, heads: int, n_state: int, dtype: Any) -> bool:
    """Whether backward blocks of two heads can be faster; with 16 keys they were slower."""
    two = block[0] == 1 and heads % 2 == 0
    return two and 16 < n_state <= 32 and dtype == jnp.bfloat16


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
    """The block of the forward kernel, and the warpgroups of a thread block.

    The smallest block while all are held at once, else the one for which the last SM finishes
    first; of equals the largest block and most warpgroups.

    Args:
        most: most warpgroups of a thread block, for each block.
        columns: columns of the state, of all heads and rows.
        target: its number of SMs counts; the H100's where unknown.
    """

    def warpgroups(block: BlockSize) -> int:
        return columns // math.prod(block)

    per_sm = -(-warpgroups(smallest) // _n_sms(target))
    if per_sm <= MAX_HELD_AT_ONCE:
        return smallest, max(1, per_sm)

    def time(choice: tuple[BlockSize, int]) -> float:
        block, held = choice
        return _time(held, warpgroups(block), _work(block, smallest), WAIT, target)

    choices = [
        (block, held)
        for block, limit in most.items()
        for held in range(1, min(limit, MAX_HELD_AT_ONCE) + 1)
    ]
    return min(choices, key=lambda choice: (time(choice), warpgroups(choice[0]), -choice[1]))


def _time(held: int, warpgroups: int, work: float, wait: float, target: Target) -> float:
    """Time until the last SM has finished, as `WAIT` counts it.

    Args:
        held: warpgroups that an SM holds at once, of `warpgroups` in all.
        work: time that a warpgroup adds.
        wait: time before all are under way.
    """
    in_turn = -(-warpgroups // (held * _n_sms(target)))
    return in_turn * (wait + held * work)


def _work(block: BlockSize, smallest: BlockSize) -> float:
    """Time that a warpgroup adds, in units of the smallest block's."""
    times = math.prod(block) / math.prod(smallest)
    return times * (SHARED if times > 1 else 1)


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
