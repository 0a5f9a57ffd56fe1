"""Lane programs: SiLU and unit length of rows of q, k or v, and their gradient."""

from collections.abc import Callable

from pallas_kernels.common.aliases import Address, Reg
from pallas_kernels.common.lane_math import dot, inverse_length, silu_and_derivative
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.sizes import THREADS
from pallas_kernels.qkv_activation.columns import LOAD_BYTES, LaneRows, Part


def activate_rows(w: LaneOps, part: Part, x: Memory, y: Memory) -> None:
    """From rows of the matmul's output to rows of q, k or v.

    Args:
        x: `[tokens, columns]`, from the first column of the part on.
        y: `[tokens, heads * size]`.
    """
    rows, (silu, unit_length) = part.rows, part.activation

    def some(own: list[Reg]) -> None:
        loaded = [_load(w, x, _addresses(w, part, part.stride, x, row)) for row in own]
        for row, words in zip(own, loaded, strict=True):
            a, _ = silu_and_derivative(w, silu, _wide(w, rows, words))
            if unit_length:
                scale, _ = inverse_length(w, rows.lanes, a)
                a = [w.fmultiply(value, scale) for value in a]
            _store(w, rows, y, _contiguous(w, rows, y, row), a)

    _over_all(w, part, x.shape[0], some)


def gradient_of_rows(w: LaneOps, part: Part, x: Memory, d_y: Memory, d_x: Memory) -> None:
    """From rows of the matmul's output and the gradient of q, k or v to the rows' gradient.

    Args:
        x, d_x: `[tokens, columns]`, from the first column of the part on.
        d_y: `[tokens, given * size]`; zeros follow.
    """
    rows, (silu, unit_length) = part.rows, part.activation

    def some(own: list[Reg]) -> None:
        loaded = [
            (_load(w, x, _addresses(w, part, part.stride, x, row)), _load_given(w, part, d_y, row))
            for row in own
        ]
        for row, words in zip(own, loaded, strict=True):
            x_wide, d = (_wide(w, rows, z) for z in words)
            a, derivatives = silu_and_derivative(w, silu, x_wide)
            if unit_length:
                scale, over = inverse_length(w, rows.lanes, a)
                # The gradient of a / (||a|| + e) is d scale - a (a . d) scale^2 / ||a||.
                along = w.fmultiply(w.fmultiply(scale, scale), over)
                along = w.negative(w.fmultiply(dot(w, rows.lanes, a, d), along))
                d = [
                    w.fma(value, along, w.fmultiply(of_value, scale))
                    for value, of_value in zip(a, d, strict=True)
                ]
            d = [w.fmultiply(of_value, s) for of_value, s in zip(d, derivatives, strict=True)]
            _store(w, rows, d_x, _addresses(w, part, part.stride, d_x, row), d)

    _over_all(w, part, x.shape[0], some)


def _over_all(w: LaneOps, part: Part, tokens: int, some: Callable[[list[Reg]], None]) -> None:
    """Emits `some(rows)` in a loop over all rows that this lane works on."""
    rows, n_rows = part.rows, tokens * part.heads
    n = -(-n_rows * rows.lanes // (THREADS * rows.in_flight))

    def body(i: Reg, carry: tuple[()]) -> tuple[()]:
        first = w.multiply(i, rows.in_flight)
        some([_row(w, rows, w.add(first, j), n_rows) for j in range(rows.in_flight)])
        return carry

    w.loop(n, (), body)


def _row(w: LaneOps, rows: LaneRows, i: Reg, n_rows: int) -> Reg:
    """The i-th row of this lane; past the end, the last one again."""
    of_thread, _ = w.divide(w.thread, rows.lanes)
    return w.minimum(w.add(w.multiply(i, THREADS // rows.lanes), of_thread), n_rows - 1)


def _addresses(w: LaneOps, part: Part, stride: int, memory: Memory, row: Reg) -> list[Address]:
    """Addresses of this lane's loads of a row in `[tokens, columns]`, heads `stride` apart."""
    token, head = w.divide(row, part.heads)
    return _of_lane(w, part.rows, memory, token, w.multiply(head, stride))


def _load_given(w: LaneOps, part: Part, memory: Memory, row: Reg) -> list[Reg]:
    """A row of `[tokens, given * size]`; zeros in place of those that are not given."""
    if part.given == part.heads:
        return _load(w, memory, _addresses(w, part, part.rows.size, memory, row))
    token, head = w.divide(row, part.heads)
    column = w.multiply(w.minimum(head, part.given - 1), part.rows.size)
    words = _load(w, memory, _of_lane(w, part.rows, memory, token, column))
    return [w.select(w.less(head, part.given), word, 0) for word in words]


def _contiguous(w: LaneOps, rows: LaneRows, memory: Memory, row: Reg) -> list[Address]:
    """`_addresses` in contiguous rows; takes fewer registers forward, but more backward."""
    return _of_lane(w, rows, memory, 0, w.multiply(row, rows.size))


def _of_lane(w: LaneOps, rows: LaneRows, memory: Memory, token: Reg, column: Reg) -> list[Address]:
    _, lane = w.divide(w.thread, rows.lanes)
    start = w.address(memory, token, w.add(column, w.multiply(lane, rows.vector)))
    step = rows.lanes * LOAD_BYTES
    return [w.add(start, j * step) for j in range(rows.loads)]


def _load(w: LaneOps, memory: Memory, addresses: list[Address]) -> list[Reg]:
    return [word for address in addresses for word in w.load(memory, address, 4)]


def _wide(w: LaneOps, rows: LaneRows, words: list[Reg]) -> list[Reg]:
    """The elements of loaded words in float32."""
    if rows.itemsize == 4:
        return [w.as_float(x) for x in words]
    both = [(w.shift_left(x, 16), w.bits_and(x, 0xFFFF0000)) for x in words]
    return [w.as_float(bits) for pair in both for bits in pair]


def _store(
    w: LaneOps, rows: LaneRows, memory: Memory, addresses: list[Address], x: list[Reg]
) -> None:
    if rows.itemsize == 4:
        words = [w.as_bits(y) for y in x]
    else:
        words = [w.pack_bf16(x[i], x[i + 1]) for i in range(0, len(x), 2)]
    for i, address in enumerate(addresses):
        w.store(memory, address, words[4 * i : 4 * i + 4])
