"""The steps of the backward kernel, as programs for the lanes of a warpgroup.

`replay` goes through steps again. As it is told their errors, `v - S^T k`, it needs no sum over
keys. `walk_back` takes their gradient, last first. Each takes `Fragments`, the memory that it works
on by name, and a state; `steps.py` says what they compute, and of what.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_kernels.fragments import STEPS, Fragments
from pallas_kernels.layouts import THREADS, WARPS


@dataclasses.dataclass(frozen=True)
class StepKind:
    """What a step of the recurrence does, whatever its sizes."""

    has_write_gate: bool
    has_keep: bool  # a document may start at a step
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


def _activated(f: Fragments, kind: StepKind, state: Any) -> Any:
    if kind.linear_state:
        return state
    return [[[f.w.tanh(x, not f.exact) for x in m] for m in unit] for unit in state]


def replay(
    f: Fragments, kind: StepKind, at: Mapping[str, Any], state: Any, n: int, unroll: int
) -> Any:
    """n steps from `state`, `unroll` of them, which divides n, written out in a row.

    Returns the state after them, and writes those before to `states`, if there is such memory.
    """
    w = f.w
    keep = "states" in at

    def load(t: Any) -> Any:
        return f.load_keys(at["k"], t), f.load_columns(at["errors"], t)

    def step(t: Any, state: Any, loaded: Any) -> Any:
        keys, error = loaded
        scalars = _Scalars(f, kind, at["scalars"], t)
        loaded = load(w.minimum(w.add(t, 1), n - 1))
        if keep:
            f.store_words(at["states"], f.narrow(state), t)
        error = scalars.gated(error)
        state = f.add_outer(scalars.decayed(state), f.factors(keys), error)
        return _activated(f, kind, state), loaded

    state, _ = _steps(w, n, unroll, step, state, load(0))
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
    """n steps back; returns the gradient of the state before them, and that state."""
    for first in reversed(range(0, n, STEPS)):
        steps = min(STEPS, n - first)
        d_state, after = _walk_back_a_few(f, kind, at, d_state, after, first, steps)
    return d_state, after


def _walk_back_a_few(
    f: Fragments,
    kind: StepKind,
    at: Mapping[str, Any],
    d_state: Any,
    after: Any,
    first: int,
    n: int,
) -> tuple[Any, Any]:
    """n steps back, at most 4, from row `first` on."""
    w = f.w
    sums = f.no_sums()
    lane_sums: list[list[Any]] = [[None] * n for _ in range(1 + kind.has_write_gate)]
    if f.exact:
        d_o = f.load_columns(at["d_out"], first + n - 1)
        sums = f.add_exact_sums(sums, n - 1, [(after, d_o)])
        q = f.wide_keys(f.load_keys(at["q"], first + n - 1))
        d_after = f.add_other_outer(d_state, (None, q), d_o)
    else:
        d_o = f.load_pair(at["d_out"], first + n - 1)
        sums = f.add_sums(sums, [(f.narrow(after), [f.at(n - 1, x) for x in d_o])])
        d_after = f.add_other_outer(d_state, f.load_keys(at["k"], first + n), d_o)
    for t in reversed(range(n)):
        row = first + t
        words = f.load_words(at["states"], row)
        keys = f.load_keys(at["k"], row)
        scalars = _Scalars(f, kind, at["scalars"], row)
        k = f.wide_keys(keys) if f.exact else f.upper(keys)
        d_sum = d_after
        if not kind.linear_state:
            d_sum = _times_derivative(f, d_after, after)
        d_correction = f.sums_over_keys(d_sum, k)
        d_v = scalars.gated(d_correction)
        d_read = [[w.negative(x) for x in unit] for unit in scalars.within_document(d_v)]
        d_after = scalars.decayed(d_sum)
        before = f.wide(words)
        if f.exact:
            if t:
                d_o = f.load_columns(at["d_out"], row - 1)
                q = f.wide_keys(f.load_keys(at["q"], row - 1))
                sums = f.add_exact_sums(sums, t - 1, [(before, d_o)])
            else:
                d_o = q = None
            d_after = f.add_two_outer(d_after, (k, q), d_read, d_o)
            correction = scalars.gated(f.load_columns(at["errors"], row))
            sums = f.add_exact_sums(sums, STEPS + t, [(before, d_read), (d_sum, correction)])
            f.store_columns(at["d_v"], d_v, row)
        else:
            d_o = f.load_pair(at["d_out"], row - 1) if t else None
            d_after = f.add_two_outer(d_after, keys, d_read, d_o)
            pairs = f.pairs(STEPS + t, d_v)
            f.store_pairs(STEPS + t, at["d_v"], pairs, row)
            pairs = f.pairs(STEPS + t, d_read) if kind.has_keep else f.negative_pairs(pairs)
            of_before = [f.at(STEPS + t, x) for x in pairs]
            if d_o is not None:
                is_q = w.equal(f.g, t - 1)
                of_before = [w.select(is_q, a, b) for a, b in zip(d_o, of_before, strict=True)]
            correction = f.load_pair(at["errors"], row, scalars.write_gate)
            of_d_sum = [f.at(STEPS + t, x) for x in correction]
            sums = f.add_sums(sums, [(words, of_before), (f.narrow(d_sum), of_d_sum)])
        lane_sums[0][t] = f.dot(d_sum, before)
        if kind.has_write_gate:
            error = f.load_columns(at["errors"], row)
            lane_sums[1][t] = f.lane_sums_of(d_correction, error)
        after = before
    _add_over_warps(f, at, sums, lane_sums, first, n)
    return d_after, after


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


def _add_over_warps(
    f: Fragments,
    at: Mapping[str, Any],
    sums: Any,
    lane_sums: list[list[Any]],
    first: int,
    n: int,
) -> None:
    """Adds what the warps of a head have of the gradients of q, k and scalars.

    Stores those of n steps, from row `first` on.
    """
    w, partial = f.w, at["partial_sums"]
    w.synchronize()  # all have read what is overwritten
    pair = w.multiply(w.lane, 8)
    for i, acc in enumerate(sums):
        for half in range(2):  # of the steps that this lane has: two keys of each
            bits = [w.as_bits(acc[half]), w.as_bits(acc[half + 2])]
            w.store(partial, w.add(pair, w.address(partial, w.warp, i, half)), bits)
    memory = at["lane_sums"]
    for i, of_steps in enumerate(lane_sums):
        for t, x in enumerate(of_steps):
            w.store(memory, w.address(memory, i, t, w.thread), [w.as_bits(x)])
    w.synchronize()

    assert STEPS == WARPS, "each warp adds the scalars of a step"
    first_warp = w.multiply(f.head, f.warps_per_head)
    is_k, t_pair = w.divide(f.c, 2)

    def add(item: Any) -> None:
        tile, half = w.divide(item, 2)
        total: list[Any] = []
        for i in range(f.warps_per_head):
            address = w.add(pair, w.address(partial, w.add(first_warp, i), tile, half))
            x = [w.as_float(bits) for bits in w.load(partial, address, 2)]
            total = [w.fadd(a, b) for a, b in zip(total, x, strict=True)] if total else x
        t = w.add(w.multiply(t_pair, 2), half)
        outer, inner = w.divide(tile, f.vector // 2)
        key = w.add(w.multiply(outer, 8 * f.vector), w.multiply(inner, 2))
        key = w.add(key, w.multiply(f.g, f.vector))
        target = at["d_keys"]
        address = w.address(target, is_k, w.add(t, first), f.head, key)
        words = [w.pack(*total)] if target.itemsize == 2 else [w.as_bits(x) for x in total]
        if n == STEPS:
            w.store(target, address, words)
        else:
            w.when(w.less(t, n), lambda: w.store(target, address, words))

    items = f.n_keys
    for i in range(-(-items // f.warps_per_head)):
        item = w.add(f.warp_of_head, i * f.warps_per_head)
        if (i + 1) * f.warps_per_head <= items:
            add(item)
        else:
            w.when(w.less(item, items), lambda item=item: add(item))

    def add_lanes() -> None:
        target = at["d_scalars"]
        lanes = 8 * f.warps_per_head  # each with the numbers of 4 threads
        for i in range(len(lane_sums)):
            address = w.add(w.multiply(w.lane, 16), w.address(memory, i, w.warp))
            x = [w.as_float(bits) for bits in w.load(memory, address, 4)]
            total = w.fadd(w.fadd(x[0], x[1]), w.fadd(x[2], x[3]))
            total = f.sum_over_lanes(total, *(d for d in (1, 2, 4, 8, 16) if d < lanes))
            head, own = w.divide(w.lane, lanes)
            address = w.address(target, i, w.add(w.warp, first), head)
            bits = [w.as_bits(total)]
            w.when(w.equal(own, 0), lambda a=address, b=bits: w.store(target, a, b))

    if n == STEPS:
        add_lanes()
    else:
        w.when(w.less(w.warp, n), add_lanes)


def pair_keys(w: Any, k: Any, q: Any, k_and_q: Any) -> None:
    """Writes words of k_t and q_{t-1}, k in the upper half: `[chunk + 1, heads, keys]`.

    There is no q before row 0, nor a k in the last row: zero.
    """
    rows, heads, keys = k_and_q.shape
    row_words = heads * keys
    for i in range(-(-rows * row_words // (4 * THREADS))):
        index = w.add(w.multiply(w.thread, 4), i * 4 * THREADS)

        def four(index: Any = index) -> None:
            row, _ = w.divide(index, row_words)
            # Rows at the ends are there, whatever they hold.
            of_k = w.load(k, w.multiply(w.minimum(index, (rows - 1) * row_words - 4), 2), 2)
            before = w.select(w.less(index, row_words), index, w.add(index, -row_words))
            of_q = w.load(q, w.multiply(before, 2), 2)
            has_k, has_q = w.less(row, rows - 1), w.less(0, row)
            of_k = [w.select(has_k, x, 0) for x in of_k]
            of_q = [w.select(has_q, x, 0) for x in of_q]
            words = [
                w.bytes_of(b, a, selector)
                for a, b in zip(of_k, of_q, strict=True)
                for selector in (0x5410, 0x7632)
            ]
            w.store(k_and_q, w.multiply(index, 4), words)

        w.when(w.less(index, rows * row_words), four)
