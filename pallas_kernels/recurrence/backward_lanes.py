"""Lane programs of the backward kernel's steps.

`replay` recomputes states; with delta saved, it needs no sum over keys. `backpropagate` takes their
gradient back, last step first. `add_d_keys` and `add_scalars` add the partial sums of warps and
lanes that it leaves in shared memory. All take `Fragments` and, by name, the memory that they work
on; `backward_block.BlockSteps` says what the names mean.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from pallas_kernels.common.aliases import Address, Reg
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.sizes import LANES, THREADS, WARPS
from pallas_kernels.recurrence.mma_fragments import (
    MMA_STEPS,
    Accumulators,
    Columns,
    Fragments,
    State,
)

_ONE = 0x3F800000
"""The bits of 1.0 in float32."""

Memories: TypeAlias = Mapping[str, Memory]
LateState: TypeAlias = Callable[[], State]
"""A state that takes half of the registers until it is called, in the dtype of the inputs."""


@dataclasses.dataclass(frozen=True)
class StepKind:
    """Options of a step of the recurrence."""

    has_write_gate: bool
    has_keep: bool  # a document may start at a step
    has_live: bool  # a row may have ended before a step
    linear_state: bool


class _Scalars:
    """The scalars of a step, for this lane's head."""

    def __init__(self, f: Fragments, kind: StepKind, memory: Memory, t: Reg) -> None:
        self.w = w = f.w

        def load(i: int) -> Reg:
            # `[heads, scalars, steps]`
            (bits,) = w.load(memory, w.address(memory, f.head, i, t), 1)
            return w.as_float(bits)

        self.decay = load(0)
        self.write_gate = load(1) if kind.has_write_gate else None
        self._keep = load(1 + kind.has_write_gate) if kind.has_keep else None
        self._is_live = None
        if kind.has_live:
            live = load(1 + kind.has_write_gate + kind.has_keep)
            self._is_live = w.equal(w.as_bits(live), _ONE)

    def _times(self, scalar: Reg, columns: Columns) -> Columns:
        if scalar is None:
            return columns
        return [[self.w.fmultiply(x, scalar) for x in tile] for tile in columns]

    def gated(self, columns: Columns) -> Columns:
        return self._times(self.write_gate, columns)

    def within_document(self, columns: Columns) -> Columns:
        return self._times(self._keep, columns)

    def decayed(self, state: State) -> State:
        return [[[self.w.fmultiply(x, self.decay) for x in m] for m in tile] for tile in state]

    def if_live(self, state: State, otherwise: State) -> State:
        if self._is_live is None:
            return state
        return jax.tree.map(lambda x, y: self.w.select(self._is_live, x, y), state, otherwise)


def _after_tanh(f: Fragments, kind: StepKind, state: State) -> State:
    if kind.linear_state:
        return state
    return [[[f.w.tanh(x, not f.exact) for x in m] for m in tile] for tile in state]


@dataclasses.dataclass(frozen=True)
class _Replay:
    """n steps that are replayed, each loading the inputs of the next."""

    f: Fragments
    kind: StepKind
    at: Memories
    n: int
    first_held: int = 0
    """The step before which the first state is stored."""

    def load(self, t: Reg) -> Any:
        return self.f.load_keys(self.at["k"], t), self.f.load_columns(self.at["delta"], t)

    def step(self, t: Reg, state: State, loaded: Any) -> tuple[State, Any]:
        f, w = self.f, self.f.w
        keys, delta = loaded
        scalars = _Scalars(f, self.kind, self.at["scalars"], t)
        loaded = self.load(w.minimum(w.add(t, 1), self.n - 1))
        held = self.at.get("own_states", self.at.get("states"))
        if held is not None and not (isinstance(t, int) and t < self.first_held):
            f.store_words(held, f.to_words(state), w.add(t, -self.first_held))
        correction = scalars.gated(delta)
        after = f.add_outer(scalars.decayed(state), f.wide_keys(keys), correction)
        return scalars.if_live(_after_tanh(f, self.kind, after), state), loaded


def replay(
    f: Fragments,
    kind: StepKind,
    at: Memories,
    state: State,
    n: int,
    unroll: int,
    first_held: int = 0,
) -> State:
    """n steps from `state`, `unroll` of them unrolled, which divides n.

    Returns the state after them, and writes those before step `first_held` and later ones to
    `states` or `own_states`, if that is given. `first_held` is 0 unless all are unrolled.
    """
    assert first_held == 0 or unroll == n, (first_held, unroll, n)
    steps = _Replay(f, kind, at, n, first_held)
    if "states" in at:
        f.w.synchronize()  # all have read the sums that `backpropagate` left there
    state, _ = _steps(f.w, n, unroll, steps.step, state, steps.load(0))
    return state


def _steps(w: LaneOps, n: int, unroll: int, step: Callable[..., Any], *carry: Any) -> Any:
    """The carry after n steps, `unroll` of them unrolled."""
    assert n % unroll == 0, (n, unroll)

    def several(i: Reg, carry: Any) -> Any:
        for j in range(unroll):
            carry = step(w.add(w.multiply(i, unroll), j), *carry)
        return carry

    return several(0, carry) if n == unroll else w.loop(n // unroll, carry, several)


def backpropagate(
    f: Fragments,
    kind: StepKind,
    at: Memories,
    d_state: State,
    after: State,
    n: int,
    first: LateState | None = None,
    in_place: bool = False,
) -> tuple[State, State]:
    """n steps back, at most 4; returns the gradient of the state before them, and that state.

    `in_place` says that `d_v` is the memory of `d_out`.
    `states` has room for 4 steps, or for 3 if `first` gives the state before all n; it is
    overwritten, also if `own_states` has the states.
    """
    d_state, before, sums = _backpropagate(
        f, kind, at, d_state, after, n, lambda i: None, first, in_place
    )
    f.w.synchronize()  # all have read their states
    _store_sums(f, at["states"], sums)
    f.w.synchronize()
    add_d_keys(f, at["states"], at["d_keys"], n)
    return d_state, before


def backpropagate_and_replay(
    f: Fragments,
    kind: StepKind,
    at: Memories,
    replayed: Memories,
    d_state: State,
    after: State,
    state: State,
) -> tuple[State, State, State]:
    """4 steps of `backpropagate`, interleaved with 4 of `replay` from `state` on `replayed`.

    Returns what both return. The sums over warps are left in `sums` for `add_d_keys`, which is
    called here for `earlier_sums` and `earlier_d_keys`, as more work to hide latency with.
    """
    steps = _Replay(f, kind, replayed, MMA_STEPS)
    carry = state, steps.load(0)

    def between(i: int) -> None:
        nonlocal carry
        carry = steps.step(i, *carry)
        if i == 2:
            add_d_keys(f, at["earlier_sums"], at["earlier_d_keys"], MMA_STEPS)

    d_state, before, sums = _backpropagate(f, kind, at, d_state, after, MMA_STEPS, between)
    _store_sums(f, at["sums"], sums)
    f.w.synchronize()
    return d_state, before, carry[0]


def _backpropagate(
    f: Fragments,
    kind: StepKind,
    at: Memories,
    d_state: State,
    after: State,
    n: int,
    between: Callable[[int], None],
    first: LateState | None = None,
    in_place: bool = False,
) -> tuple[State, State, Accumulators]:
    """`backpropagate`'s results, and this warp's partial sums of the gradients of q and k.

    `between(i)` emits independent work that hides the latency of the reduction over keys of the
    i-th step from the end.
    """
    w = f.w
    states = at.get("own_states", at["states"])
    sums = f.zero_accumulators()
    scalars_of_steps: list[list[Reg]] = [[None] * n for _ in range(1 + kind.has_write_gate)]
    d_o = f.load_d_out(at["d_out"], n - 1)
    d_after = f.add_outer_of_d_out(d_state, f.load_keys(at["q"], n - 1), d_o)
    if f.exact:
        sums = f.accumulate_exactly(sums, n - 1, [(after, d_o)])
    else:
        sums = f.accumulate(sums, f.to_words(after), f.only(n - 1, d_o))
    for t in reversed(range(n)):
        if first is None:
            words = f.load_words(states, t)
        else:
            words = f.load_words(states, t - 1) if t else f.to_words(first())
        k = f.wide_keys(f.load_keys(at["k"], t))
        scalars = _Scalars(f, kind, at["scalars"], t)
        d_sum = d_after
        if not kind.linear_state:
            d_sum = _times_derivative(f, d_after, after)
        d_correction = f.sums_over_keys(d_sum, k)
        between(n - 1 - t)
        if in_place:
            w.synchronize_warp()  # its lanes have read d_out of this step
        d_v = scalars.gated(d_correction)
        d_read = [[w.negative(x) for x in tile] for tile in scalars.within_document(d_v)]
        d_after = scalars.if_live(scalars.decayed(d_sum), d_after)
        d_o = None
        if t:
            d_o = f.load_d_out(at["d_out"], t - 1)
            d_after = f.add_outer_of_d_out(d_after, f.load_keys(at["q"], t - 1), d_o)
        d_after = f.add_outer(d_after, k, d_read)
        before = f.from_words(words)
        delta = f.load_both_columns(at["delta"], t)
        correction = scalars.gated(delta)
        if f.exact:
            if d_o is not None:
                sums = f.accumulate_exactly(sums, t - 1, [(before, d_o)])
            of_k = [(before, d_read), (d_sum, correction)]
            sums = f.accumulate_exactly(sums, MMA_STEPS + t, of_k)
            f.store_columns(at["d_v"], d_v, t)
        else:
            pairs = f.pairs(MMA_STEPS + t, d_v)
            f.store_pairs(MMA_STEPS + t, at["d_v"], pairs, t)
            pairs = f.pairs(MMA_STEPS + t, d_read) if kind.has_keep else f.negative_pairs(pairs)
            bits = [w.as_bits(x) for tile in correction for x in tile]
            of_step = f.only(MMA_STEPS + t, [*pairs, *bits])
            of_before, of_d_sum = of_step[: f.n_tiles], of_step[f.n_tiles :]
            if d_o is not None:
                is_q = w.equal(f.g, t - 1)
                of_before = [w.select(is_q, a, b) for a, b in zip(d_o, of_before, strict=True)]
            sums = f.accumulate(sums, words, of_before)
            sums = f.accumulate_tf32(sums, d_sum, of_d_sum)
        scalars_of_steps[0][t] = f.dot(d_sum, before)
        if kind.has_write_gate:
            scalars_of_steps[1][t] = f.lane_part_of_dot(d_correction, f.own_columns(delta))
        after = before
    _store_partial_scalars(f, at["partial_scalars"], scalars_of_steps)
    return d_after, after, sums


def _times_derivative(f: Fragments, d_after: State, after: State) -> State:
    """d_after times the derivative of tanh, 1 - after^2."""
    w = f.w
    one = w.number(1.0)

    def times(d: Reg, s: Reg) -> Reg:
        return w.fmultiply(d, w.fma(w.negative(s), s, one))

    return [
        [[times(d, s) for d, s in zip(*m, strict=True)] for m in zip(*tile, strict=True)]
        for tile in zip(d_after, after, strict=True)
    ]


def _store_partial_scalars(f: Fragments, memory: Memory, of_steps: list[list[Reg]]) -> None:
    """Sums each lane's numbers for at most 4 steps over 8 lanes, and stores the 4 partial sums of
    a warp in rows `[..., WARPS, 4]`, or their sum in `[..., WARPS, 1]`."""
    w = f.w
    _, step = w.divide(w.lane, MMA_STEPS)
    octet, _ = w.divide(w.lane, 8)
    one_sum = memory.shape[-1] == 1
    first_bit, second_bit = (w.equal(w.bits_and(w.lane, bit), bit) for bit in (1, 2))

    def halved(takes_second: Reg, a: Reg, b: Reg, distance: int) -> Reg:
        """Each lane gives away one number and goes on with the other."""
        given = w.shuffle_xor(w.select(takes_second, a, b), distance)
        return w.fadd(w.select(takes_second, b, a), given)

    for i, x in enumerate(of_steps):
        n = len(x)
        x = [*x, *[w.number(0.0)] * (MMA_STEPS - n)]
        halves = [halved(first_bit, x[j], x[j + 1], 1) for j in (0, 2)]
        total = halved(second_bit, halves[0], halves[1], 2)
        total = w.fadd(total, w.shuffle_xor(total, 4))
        if one_sum:
            total = f.sum_over_lanes(total, 8, 16)
        address = w.address(memory, i, step, w.warp, 0 if one_sum else octet)

        def store(address: Address = address, total: Reg = total) -> None:
            w.store(memory, address, [w.as_bits(total)])

        # Lanes that have the same sum write the same.
        if n == MMA_STEPS:
            store()
        else:
            w.when(w.less(step, n), store)


def add_scalars(f: Fragments, partial_scalars: Memory, d_scalars: Memory) -> None:
    """Writes the gradients of scalars, `[1 or 2, n, heads]`, from partial sums."""
    w = f.w
    n_scalars, n, _ = d_scalars.shape
    row_of_thread, warp = w.divide(w.thread, WARPS)
    head, rest = w.divide(warp, f.warps_per_head)
    for i in range(n_scalars):
        for start in range(0, n, THREADS // WARPS):
            row = w.add(row_of_thread, start)
            address = w.address(partial_scalars, i, w.minimum(row, n - 1), warp)
            n_sums = partial_scalars.shape[-1]
            x = [w.as_float(bits) for bits in w.load(partial_scalars, address, n_sums)]
            total = x[0] if n_sums == 1 else w.fadd(w.fadd(x[0], x[1]), w.fadd(x[2], x[3]))
            total = f.sum_over_lanes(total, *(d for d in (1, 2) if d < f.warps_per_head))

            def store(address: Address, total: Reg = total) -> None:
                w.when(w.equal(rest, 0), lambda: w.store(d_scalars, address, [w.as_bits(total)]))

            address = w.address(d_scalars, i, row, head)
            w.when(w.less(row, n), lambda store=store, address=address: store(address))


def _store_sums(f: Fragments, partial: Memory, sums: Accumulators) -> None:
    """Stores a warp's partial sums of the gradients of q and k where `add_d_keys` finds them."""
    for i, (a, b, c, d) in enumerate(sums):
        address = _address_of_sums(f, f.w.warp, i)
        f.w.store(partial, address, [f.w.as_bits(x) for x in (a, c, b, d)])


def _address_of_sums(f: Fragments, warp: Reg, tile: Reg) -> Address:
    """Where a warp's partial sums for a tile of 16 keys are, 4 of this lane."""
    w = f.w
    tiles = w.add(w.multiply(warp, f.lane_keys // 2), tile)
    return w.add(w.multiply(w.lane, 16), w.multiply(tiles, LANES * 16))


def add_d_keys(f: Fragments, partial: Memory, d_keys: Memory, n: int) -> None:
    """Writes the gradients of q and k of n steps, at most 4: sums over the warps of a head of what
    all have stored."""
    w = f.w
    is_k, t_pair = w.divide(f.c, 2)
    tiles = f.lane_keys // 2

    def add(job: Reg) -> None:
        """Sums two keys of a lane, in one of its two steps, over the warps of their head."""
        head_and_tile, j = w.divide(job, 2)
        head, tile = w.divide(head_and_tile, tiles)
        total: list[Reg] = []
        for i in range(f.warps_per_head):
            address = _address_of_sums(f, w.add(w.multiply(head, f.warps_per_head), i), tile)
            x = w.load(partial, w.add(address, w.multiply(j, 8)), 2)
            x = [w.as_float(bits) for bits in x]
            total = [w.fadd(a, b) for a, b in zip(total, x, strict=True)] if total else x
        outer, inner = w.divide(tile, f.vector // 2)
        key = w.add(w.multiply(outer, 8 * f.vector), w.multiply(inner, 2))
        key = w.add(key, w.multiply(f.g, f.vector))
        t = w.add(w.multiply(t_pair, 2), j)
        address = w.address(d_keys, is_k, t, head, key)
        words = [w.as_bits(x) for x in total] if f.exact else [w.pack_bf16(*total)]
        if n == MMA_STEPS:
            w.store(d_keys, address, words)
        else:
            w.when(w.less(t, n), lambda: w.store(d_keys, address, words))

    jobs = f.heads * tiles * 2
    # Neighbouring warpgroups give the odd job to different warps, so to different schedulers.
    turn = w.multiply(w.warpgroup, WARPS // 2)
    _, start = w.divide(w.add(w.warp, turn), WARPS)
    for i in range(0, jobs, WARPS):
        job = w.add(start, i)
        if i + WARPS <= jobs:
            add(job)
        else:
            w.when(w.less(job, jobs), lambda job=job: add(job))
