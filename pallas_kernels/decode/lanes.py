"""Lane program of the decode kernel.

A warp holds 32 columns of a head's state, one on each lane: a sum over keys stays in a lane, and
each q_i and k_i, held by lane i, reaches the others by a shuffle.
"""

import functools
from collections.abc import Iterator, Mapping

from pallas_kernels.common.aliases import Address, Reg
from pallas_kernels.common.lane_math import inverse_length, sigmoid, silu_and_derivative
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.sizes import LANES, WARPS
from pallas_kernels.decode.config import DecodeConfig
from pallas_kernels.qkv_activation.columns import Activation

CHAINS = 4
"""Chains of FMAs of a sum over keys, to hide their latency."""


def token_of_row(w: LaneOps, config: DecodeConfig, group: Reg, ref: Mapping[str, Memory]) -> None:
    """One token of a row of the batch, by the `group`-th 4 warps.

    Args:
        ref: memory of the row: x `[columns]`, decay and perhaps write_gate `[H]`, state
            `[H, N, V]`, which is updated, and out `[H * V]`, which is written.
    """
    warp = w.add(w.multiply(group, WARPS), w.warp)
    w.when(w.less(warp, config.warps), lambda: _token_of_warp(w, config, warp, ref))


def _token_of_warp(w: LaneOps, config: DecodeConfig, warp: Reg, ref: Mapping[str, Memory]) -> None:
    columns, x, state = config.columns, ref["x"], ref["state"]
    n_state, n_value = columns.n_state, columns.n_value
    head, block = w.divide(warp, config.warps_per_head)
    column = w.add(w.multiply(block, LANES), w.lane)
    own = w.minimum(column, n_value - 1)
    # None where every lane has a column.
    exists = w.less(column, n_value) if n_value % LANES else None

    first = w.address(state, head, 0, column)
    addresses = [w.add(first, i * state.strides[1]) for i in range(n_state)]
    old = [w.as_float(_load_where(w, exists, state, address)) for address in addresses]

    keys = Activation(columns.silu, columns.unit_length)
    of_head = w.multiply(head, columns.of_head)
    q, k = (_over_lanes(w, x, w.add(of_head, start), n_state, keys) for start in (0, n_state))
    v = _element(w, x, w.add(w.add(of_head, own), 2 * n_state))
    value = w.add(w.multiply(head, n_value), own)  # of out and the gate
    ((v,), _) = silu_and_derivative(w, columns.silu, [v])

    decay = _element(w, ref["decay"], head)
    correction = w.fadd(v, w.negative(_sum_over_keys(w, old, k)))
    if "write_gate" in ref:
        correction = w.fmultiply(correction, _element(w, ref["write_gate"], head))
    new = [
        w.fma(key, correction, w.fmultiply(decay, s))
        for s, key in zip(old, _on_every_lane(w, k, n_state), strict=True)
    ]
    if not config.linear_state:
        new = [w.tanh(s, approximate=x.itemsize == 2) for s in new]

    out = _sum_over_keys(w, new, q)
    if config.gate != "none":
        gate = _element(w, x, w.add(value, config.gate_start))
        factor = sigmoid(w, gate)
        if config.gate == "silu":
            factor = w.fmultiply(gate, factor)
        out = w.fmultiply(out, factor)
    word = _word_of(w, ref["out"], out)

    def store() -> None:
        for address, s in zip(addresses, new, strict=True):
            w.store(state, address, [w.as_bits(s)])
        index, _ = w.divide(value, 4 // ref["out"].itemsize)
        w.store(ref["out"], w.multiply(index, 4), [word])

    store() if exists is None else w.when(exists, store)


def _element(w: LaneOps, memory: Memory, index: Reg) -> Reg:
    """Element `index` of a row in memory, in float32."""
    address = w.address(memory, index)
    if memory.itemsize == 4:
        return w.as_float(w.load(memory, address, 1)[0])
    return w.as_float(w.shift_left(w.load_half(memory, address), 16))


def _over_lanes(
    w: LaneOps, memory: Memory, first: Reg, n: int, activation: Activation
) -> list[Reg]:
    """n activated elements: element i on lane i % 32, at i // 32; zeros after them."""
    x = []
    for start in range(0, n, LANES):
        i = w.add(w.lane, start)
        y = _element(w, memory, w.add(first, w.minimum(i, n - 1)))
        if start + LANES > n:
            y = w.as_float(w.select(w.less(i, n), w.as_bits(y), 0))
        x.append(y)
    x, _ = silu_and_derivative(w, activation.silu, x)
    if activation.unit_length:
        scale, _ = inverse_length(w, LANES, x)
        x = [w.fmultiply(y, scale) for y in x]
    return x


def _on_every_lane(w: LaneOps, x: list[Reg], n: int) -> Iterator[Reg]:
    """The n elements of `_over_lanes`, one after the other, on every lane."""
    return (w.shuffle_from(x[i // LANES], i % LANES) for i in range(n))


def _sum_over_keys(w: LaneOps, column: list[Reg], x: list[Reg]) -> Reg:
    sums: list[Reg] = []
    for i, (s, key) in enumerate(zip(column, _on_every_lane(w, x, len(column)), strict=True)):
        if i < CHAINS:
            sums.append(w.fmultiply(s, key))
        else:
            sums[i % CHAINS] = w.fma(s, key, sums[i % CHAINS])
    return functools.reduce(w.fadd, sums)


def _load_where(w: LaneOps, condition: Reg, memory: Memory, address: Address) -> Reg:
    if condition is None:
        return w.load(memory, address, 1)[0]
    return w.load_where(condition, memory, address)


def _word_of(w: LaneOps, memory: Memory, x: Reg) -> Reg:
    """The word of memory with this lane's element; in bfloat16 with its neighbour's too."""
    if memory.itemsize == 4:
        return w.as_bits(x)
    _, odd = w.divide(w.lane, 2)
    is_odd, other = w.equal(odd, 1), w.shuffle_xor(x, 1)
    own, other = (w.as_bits(y) for y in (x, other))
    low, high = w.select(is_odd, other, own), w.select(is_odd, own, other)
    return w.pack_bf16(w.as_float(low), w.as_float(high))
