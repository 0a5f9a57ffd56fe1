"""The steps of the backward kernel, as programs for the lanes of a warpgroup.

`replay` goes through steps again. As it is told their errors, `v - S^T k`, it needs no sum over
keys. `walk_back` takes their gradient, last first. Both take `Fragments`, the memory that they work
on by name, and a state. `add_scalars` ends what `walk_back` began. `steps.py` says what they
compute, and of what.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.fragments import STEPS, Fragments
from pallas_kernels.layouts import THREADS, WARPS

_ONE = 0x3F800000
"""The bits of 1.0 in float32."""


@dataclasses.dataclass(frozen=True)
class StepKind:
    """What a step of the recurrence does, whatever its sizes."""

    has_write_gate: bool
    has_keep: bool  # a document may start at a step
    has_live: bool  # a row may have ended before a step
    linear_state: bool


class _Scalars:
    """What a step multiplies with, of this lane's head."""

    def __init__(self, f: Fragments, kind: StepKind, memory: Any, t: Any) -> None:
        self.w = w = f.w

        def load(i: int) -> Any:
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

    def _times(self, scalar: Any, columns: Any) -> Any:
        if scalar is None:
            return columns
        return [[self.w.fmultiply(x, scalar) for x in unit] for unit in columns]

    def gated(self, columns: Any) -> Any:
        return self._times(self.write_gate, columns)

    def within_document(self, columns: Any) -> Any:
        return self._times(self._keep, columns)

    def decayed(self, state: Any) -> Any:
        return [[[self.w.fmultiply(x, self.decay) for x in m] for m in unit] for unit in state]

    def if_live(self, state: Any, otherwise: Any) -> Any:
        if self._is_live is None:
            return state
        return jax.tree.map(lambda x, y: self.w.select(self._is_live, x, y), state, otherwise)


def _activated(f: Fragments, kind: StepKind, state: Any) -> Any:
    if kind.linear_state:
        return state
    return [[[f.w.tanh(x, not f.exact) for x in m] for m in unit] for unit in state]


@dataclasses.dataclass(frozen=True)
class _Replay:
    """Steps gone through again, from loads that are made a step ahead."""

    f: Fragments
    kind: StepKind
    at: Mapping[str, Any]
    n: int

    def load(self, t: Any) -> Any:
        return self.f.load_keys(self.at["k"], t), self.f.load_columns(self.at["errors"], t)

    def step(self, t: Any, state: Any, loaded: Any) -> Any:
        f, w = self.f, self.f.w
        keys, error = loaded
        scalars = _Scalars(f, self.kind, self.at["scalars"], t)
        loaded = self.load(w.minimum(w.add(t, 1), self.n - 1))
        f.store_words(self.at["states"], f.narrow(state), t)
        error = scalars.gated(error)
        after = f.add_outer(scalars.decayed(state), f.wide_keys(keys), error)
        return scalars.if_live(_activated(f, self.kind, after), state), loaded


def replay(
    f: Fragments, kind: StepKind, at: Mapping[str, Any], state: Any, n: int, unroll: int
) -> Any:
    """n steps from `state`, `unroll` of them, which divides n, written out in a row.

    Returns the state after them, and writes those before to `states`.
    """
    again = _Replay(f, kind, at, n)
    f.w.synchronize()  # all have read the sums that `walk_back` left there
    state, _ = _steps(f.w, n, unroll, again.step, state, again.load(0))
    return state


def _steps(w: Any, n: int, unroll: int, step: Any, *carry: Any) -> Any:
    """`carry`, through n steps, so many of them written out in a row."""
    assert n % unroll == 0, (n, unroll)

    def several(i: Any, carry: Any) -> Any:
        for j in range(unroll):
            carry = step(w.add(w.multiply(i, unroll), j), *carry)
        return carry

    return several(0, carry) if n == unroll else w.loop(n // unroll, carry, several)


def walk_back(
    f: Fragments, kind: StepKind, at: Mapping[str, Any], d_state: Any, after: Any, n: int
) -> tuple[Any, Any]:
    """n steps back, at most 4; returns the gradient of the state before them, and that state.

    `states` has room for 4 steps, and is overwritten.
    """
    d_state, before, sums = _walk_back(f, kind, at, d_state, after, n, lambda i: None)
    f.w.synchronize()  # all have read their states
    _store_sums(f, at["states"], sums)
    f.w.synchronize()
    add_d_keys(f, at["states"], at["d_keys"], n)
    return d_state, before


def walk_back_and_replay(
    f: Fragments,
    kind: StepKind,
    at: Mapping[str, Any],
    ahead: Mapping[str, Any],
    d_state: Any,
    after: Any,
    state: Any,
) -> tuple[Any, Any, Any]:
    """4 steps of `walk_back`, and in its waits 4 of `replay`, from `state`, of what is `ahead`.

    Returns what both return. The sums over warps are left in `sums`, for `add_d_keys`; it is called
    here, also to fill waits, for `earlier_sums` and `earlier_d_keys`.
    """
    again = _Replay(f, kind, ahead, STEPS)
    replayed = state, again.load(0)

    def between(i: int) -> None:
        nonlocal replayed
        replayed = again.step(i, *replayed)
        if i == 2:
            add_d_keys(f, at["earlier_sums"], at["earlier_d_keys"], STEPS)

    d_state, before, sums = _walk_back(f, kind, at, d_state, after, STEPS, between)
    _store_sums(f, at["sums"], sums)
    f.w.synchronize()
    return d_state, before, replayed[0]


def _walk_back(
    f: Fragments,
    kind: StepKind,
    at: Mapping[str, Any],
    d_state: Any,
    after: Any,
    n: int,
    between: Callable[[int], None],
) -> tuple[Any, Any, Any]:
    """What `walk_back` returns, and this warp's part of the gradients of q and k.

    `between(i)` emits what the i-th step that is walked back can wait with for its sums over keys.
    """
    w = f.w
    sums = f.no_sums()
    scalars_of_steps: list[list[Any]] = [[None] * n for _ in range(1 + kind.has_write_gate)]
    d_o = f.load_d_out(at["d_out"], n - 1)
    d_after = f.add_outer_of_d_out(d_state, f.load_keys(at["q"], n - 1), d_o)
    if f.exact:
        sums = f.add_exact_sums(sums, n - 1, [(after, d_o)])
    else:
        sums = f.add_sums(sums, f.narrow(after), f.only(n - 1, d_o))
    for t in reversed(range(n)):
        words = f.load_words(at["states"], t)
        k = f.wide_keys(f.load_keys(at["k"], t))
        scalars = _Scalars(f, kind, at["scalars"], t)
        d_sum = d_after
        if not kind.linear_state:
            d_sum = _times_derivative(f, d_after, after)
        d_correction = f.sums_over_keys(d_sum, k)
        between(n - 1 - t)
        d_v = scalars.gated(d_correction)
        d_read = [[w.negative(x) for x in unit] for unit in scalars.within_document(d_v)]
        d_after = scalars.if_live(scalars.decayed(d_sum), d_after)
        d_o = None
        if t:
            d_o = f.load_d_out(at["d_out"], t - 1)
            d_after = f.add_outer_of_d_out(d_after, f.load_keys(at["q"], t - 1), d_o)
        d_after = f.add_outer(d_after, k, d_read)
        before = f.wide(words)
        errors = f.load_both_columns(at["errors"], t)
        correction = scalars.gated(errors)
        if f.exact:
            if d_o is not None:
                sums = f.add_exact_sums(sums, t - 1, [(before, d_o)])
            sums = f.add_exact_sums(sums, STEPS + t, [(before, d_read), (d_sum, correction)])
            f.store_columns(at["d_v"], d_v, t)
        else:
            pairs = f.pairs(STEPS + t, d_v)
            f.store_pairs(STEPS + t, at["d_v"], pairs, t)
            pairs = f.pairs(STEPS + t, d_read) if kind.has_keep else f.negative_pairs(pairs)
            bits = [w.as_bits(x) for unit in correction for x in unit]
            of_step = f.only(STEPS + t, [*pairs, *bits])
            of_before, of_d_sum = of_step[: f.units], of_step[f.units :]
            if d_o is not None:
                is_q = w.equal(f.g, t - 1)
                of_before = [w.select(is_q, a, b) for a, b in zip(d_o, of_before, strict=True)]
            sums = f.add_sums(sums, words, of_before)
            sums = f.add_wide_sums(sums, d_sum, of_d_sum)
        scalars_of_steps[0][t] = f.dot(d_sum, before)
        if kind.has_write_gate:
            scalars_of_steps[1][t] = f.lane_sums_of(d_correction, f.own_columns(errors))
        after = before
    _add_over_lanes(f, at["partial_scalars"], scalars_of_steps)
    return d_after, after, sums


def _times_derivative(f: Fragments, d_after: Any, after: Any) -> Any:
    """Times `1 - tanh(x)**2`, of the tanh itself."""
    w = f.w
    one = w.number(1.0)

    def times(d: Any, s: Any) -> Any:
        return w.fmultiply(d, w.fma(w.negative(s), s, one))

    return [
        [[times(d, s) for d, s in zip(*m, strict=True)] for m in zip(*unit, strict=True)]
        for unit in zip(d_after, after, strict=True)
    ]


def _add_over_lanes(f: Fragments, memory: Any, of_steps: list[list[Any]]) -> None:
    """Adds the numbers that each lane has for at most 4 steps over groups of 8 lanes; stores what
    comes of it in rows `[..., WARPS, 4]`."""
    w = f.w
    _, step = w.divide(w.lane, STEPS)
    octet, _ = w.divide(w.lane, 8)
    first_bit, second_bit = (w.equal(w.bits_and(w.lane, bit), bit) for bit in (1, 2))

    def halved(takes_second: Any, a: Any, b: Any, distance: int) -> Any:
        """Each lane gives away one number and goes on with the other."""
        given = w.exchange(w.select(takes_second, a, b), distance)
        return w.fadd(w.select(takes_second, b, a), given)

    for i, x in enumerate(of_steps):
        n = len(x)
        x = [*x, *[w.number(0.0)] * (STEPS - n)]
        halves = [halved(first_bit, x[j], x[j + 1], 1) for j in (0, 2)]
        total = halved(second_bit, halves[0], halves[1], 2)
        total = w.fadd(total, w.exchange(total, 4))
        address = w.address(memory, i, step, w.warp, octet)

        def store(address: Any = address, total: Any = total) -> None:
            w.store(memory, address, [w.as_bits(total)])

        # The lanes that have the same write the same.
        if n == STEPS:
            store()
        else:
            w.when(w.less(step, n), store)


def add_scalars(f: Fragments, partial_scalars: Any, d_scalars: Any) -> None:
    """Writes the gradients of scalars, `[1 or 2, n, heads]`, from what lanes added up."""
    w = f.w
    n_scalars, n, _ = d_scalars.shape
    row_of_thread, warp = w.divide(w.thread, WARPS)
    head, rest = w.divide(warp, f.warps_per_head)
    for i in range(n_scalars):
        for start in range(0, n, THREADS // WARPS):
            row = w.add(row_of_thread, start)
            address = w.address(partial_scalars, i, w.minimum(row, n - 1), warp)
            x = [w.as_float(bits) for bits in w.load(partial_scalars, address, 4)]
            total = w.fadd(w.fadd(x[0], x[1]), w.fadd(x[2], x[3]))
            total = f.sum_over_lanes(total, *(d for d in (1, 2) if d < f.warps_per_head))

            def store(address: Any, total: Any = total) -> None:
                w.when(w.equal(rest, 0), lambda: w.store(d_scalars, address, [w.as_bits(total)]))

            address = w.address(d_scalars, i, row, head)
            w.when(w.less(row, n), lambda store=store, address=address: store(address))


def _store_sums(f: Fragments, partial: Any, sums: Any) -> None:
    """A warp's part of the gradients of q and k in 4 steps, where `add_d_keys` finds it."""
    for i, (a, b, c, d) in enumerate(sums):
        address = _of_sums(f, f.w.warp, i)
        f.w.store(partial, address, [f.w.as_bits(x) for x in (a, c, b, d)])


def _of_sums(f: Fragments, warp: Any, tile: Any) -> Any:
    """Where this lane's 4 numbers of a tile of 16 keys are, of a warp."""
    w = f.w
    tiles = w.add(w.multiply(warp, f.n_keys // 2), tile)
    return w.add(w.multiply(w.lane, 16), w.multiply(tiles, 32 * 16))


def add_d_keys(f: Fragments, partial: Any, d_keys: Any, n: int) -> None:
    """Adds what the warps of a head have of the gradients of q and k, once all have stored it;
    stores these, of n steps, at most 4."""
    w = f.w
    is_k, t_pair = w.divide(f.c, 2)
    tiles = f.n_keys // 2

    def add(job: Any) -> None:
        """Two keys of a lane, in one of its two steps: over the warps of their head."""
        head_and_tile, j = w.divide(job, 2)
        head, tile = w.divide(head_and_tile, tiles)
        total: list[Any] = []
        for i in range(f.warps_per_head):
            address = _of_sums(f, w.add(w.multiply(head, f.warps_per_head), i), tile)
            x = w.load(partial, w.add(address, w.multiply(j, 8)), 2)
            x = [w.as_float(bits) for bits in x]
            total = [w.fadd(a, b) for a, b in zip(total, x, strict=True)] if total else x
        outer, inner = w.divide(tile, f.vector // 2)
        key = w.add(w.multiply(outer, 8 * f.vector), w.multiply(inner, 2))
        key = w.add(key, w.multiply(f.g, f.vector))
        t = w.add(w.multiply(t_pair, 2), j)
        address = w.address(d_keys, is_k, t, head, key)
        words = [w.as_bits(x) for x in total] if f.exact else [w.pack(*total)]
        if n == STEPS:
            w.store(d_keys, address, words)
        else:
            w.when(w.less(t, n), lambda: w.store(d_keys, address, words))

    jobs = f.heads * tiles * 2
    # In neighbouring warpgroups other warps have more of them: a scheduler has one of each.
    turn = w.multiply(w.warpgroup, WARPS // 2)
    _, start = w.divide(w.add(w.warp, turn), WARPS)
    for i in range(0, jobs, WARPS):
        job = w.add(start, i)
        if i + WARPS <= jobs:
            add(job)
        else:
            w.when(w.less(job, jobs), lambda job=job: add(job))
