"""SiLU and unit length of queries, keys and values that come side by side from one product.

One pass over the product makes them, another its gradient; XLA takes two passes each, as what a row
is divided by is a sum over it. A thread block has some tokens of q, k or v. Lanes side by side have
pieces of 16 bytes of a head, so that a sum over its numbers takes a few exchanges.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import run_blocks
from pallas_kernels.calls import over_rows
from pallas_kernels.layouts import THREADS, inline
from pallas_kernels.warp import Memory, Warp

PIECE_BYTES = 16
"""Of a load: the most that there is."""
MOST_OF_A_LANE = 32
"""Most numbers of a head that a lane holds."""
AT_ONCE = 2
"""Pieces whose loads a lane waits for together, where a row has fewer."""
PIECES_OF_A_THREAD = 16
"""About how many a thread works on: few blocks have little ado, and little is done twice at the end
of each; more of them fill the GPU."""
LENGTH_EPSILON = 1e-6
"""Added to the length that a row is divided by, as in the original implementation."""
SMALLEST = 1.2e-38
"""Nearly the smallest normal float32, for a row of zeros."""


class Activation(NamedTuple):
    """What is done to each row, a head of a token."""

    silu: bool
    unit_length: bool


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of so many numbers, of a dtype, over the lanes of warps."""

    size: int
    itemsize: int

    @property
    def vector(self) -> int:
        """Numbers of a piece."""
        return PIECE_BYTES // self.itemsize

    @property
    def lanes(self) -> int:
        """That share a row: a power of two, for exchanges."""
        pieces = self.size // self.vector
        return min(32, pieces & -pieces)

    @property
    def pieces(self) -> int:
        """Of a lane; those of neighbouring lanes are side by side."""
        return self.size // (self.vector * self.lanes)

    @property
    def at_once(self) -> int:
        """Rows whose loads a lane waits for together."""
        return max(1, AT_ONCE // self.pieces)


class Part(NamedTuple):
    """Neighbouring columns of the product: `heads` rows of each token."""

    name: str
    start: int
    heads: int
    rows: Rows
    activation: Activation

    @property
    def stop(self) -> int:
        return self.start + self.heads * self.rows.size

    def tokens(self, of_all: int) -> int:
        """Of a thread block."""
        pieces = self.heads * self.rows.lanes * self.rows.pieces
        return max(1, min(of_all, THREADS * PIECES_OF_A_THREAD // pieces))


@dataclasses.dataclass(frozen=True)
class Split:
    """What a product `[..., columns]` holds: q, k and v of all heads, and the rest."""

    heads: int
    n_state: int
    n_value: int
    silu: bool
    unit_length: bool

    @property
    def columns(self) -> int:
        """Of q, k and v."""
        return self.heads * (2 * self.n_state + self.n_value)

    def parts(self, columns: int, itemsize: int) -> list[Part]:
        """Of a product with so many columns."""
        unit = Activation(self.silu, self.unit_length)
        vector = PIECE_BYTES // itemsize
        sizes = {
            "q": (self.heads, self.n_state, unit),
            "k": (self.heads, self.n_state, unit),
            "v": (self.heads, self.n_value, Activation(self.silu, False)),
            "rest": ((columns - self.columns) // vector, vector, Activation(False, False)),
        }
        parts: list[Part] = []
        start = 0
        for name, (heads, size, activation) in sizes.items():
            if heads:
                parts.append(Part(name, start, heads, Rows(size, itemsize), activation))
                start = parts[-1].stop
        return parts

    def unsupported(self, columns: int, dtype: Any) -> str | None:
        """Why the kernels do not take a product of so many columns, or None if they do."""
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16, got {jnp.dtype(dtype).name}"
        vector = PIECE_BYTES // jnp.dtype(dtype).itemsize
        for name, size in (("N", self.n_state), ("V", self.n_value), ("columns", columns)):
            if size % vector:
                return f"takes {name} a multiple of {vector}, got {size}"
        for part in self.parts(columns, jnp.dtype(dtype).itemsize):
            most = part.rows.pieces * vector
            if most > MOST_OF_A_LANE:
                size, name = part.rows.size, "V" if part.name == "v" else "N"
                return f"takes {name} of at most {MOST_OF_A_LANE} numbers a lane, got {size}"
        return None


def _row(w: Any, rows: Rows, i: Any, n_rows: int) -> Any:
    """The i-th row that this lane works on; some work on the last one again."""
    of_thread, _ = w.divide(w.thread, rows.lanes)
    return w.minimum(w.add(w.multiply(i, THREADS // rows.lanes), of_thread), n_rows - 1)


def _addresses(w: Any, rows: Rows, heads: int, memory: Any, row: Any) -> list[Any]:
    """Of this lane's pieces of a row, in `[tokens, heads * size]`."""
    token, head = w.divide(row, heads)
    _, lane = w.divide(w.thread, rows.lanes)
    first = w.add(w.multiply(head, rows.size), w.multiply(lane, rows.vector))
    start = w.address(memory, token, first)
    step = rows.lanes * PIECE_BYTES
    return [w.add(start, j * step) for j in range(rows.pieces)]


def _load(w: Any, rows: Rows, memory: Any, addresses: list[Any]) -> list[Any]:
    return [word for address in addresses for word in w.load(memory, address, 4)]


def _wide(w: Any, rows: Rows, words: list[Any]) -> list[Any]:
    """In float32."""
    if rows.itemsize == 4:
        return [w.as_float(x) for x in words]
    both = [(w.shift_left(x, 16), w.bits_and(x, 0xFFFF0000)) for x in words]
    return [w.as_float(bits) for pair in both for bits in pair]


def _store(w: Any, rows: Rows, memory: Any, addresses: list[Any], x: list[Any]) -> None:
    if rows.itemsize == 4:
        words = [w.as_bits(y) for y in x]
    else:
        words = [w.pack(x[i], x[i + 1]) for i in range(0, len(x), 2)]
    for i, address in enumerate(addresses):
        w.store(memory, address, words[4 * i : 4 * i + 4])


def _sum(w: Any, lanes: int, x: list[Any], y: list[Any]) -> Any:
    """Of x y over a row that so many lanes share."""
    total = w.fmultiply(x[0], y[0])
    for a, b in zip(x[1:], y[1:], strict=True):
        total = w.fma(a, b, total)
    distance = 1
    while distance < lanes:
        total = w.fadd(total, w.exchange(total, distance))
        distance *= 2
    return total


def sigmoid(w: Any, x: Any) -> Any:
    power = w.exp2(w.fmultiply(x, w.number(-math.log2(math.e))))
    return w.reciprocal(w.fadd(w.number(1.0), power))


def after_silu(w: Any, activation: Activation, x: list[Any]) -> tuple[list[Any], list[Any]]:
    """x after SiLU, and the derivative of that."""
    if not activation.silu:
        return x, [w.number(1.0)] * len(x)
    one = w.number(1.0)
    results, derivatives = [], []
    for y in x:
        s = sigmoid(w, y)
        result = w.fmultiply(y, s)
        results.append(result)
        # s + y s (1 - s)
        derivatives.append(w.fma(result, w.fma(w.negative(s), one, one), s))
    return results, derivatives


def over_length(w: Any, lanes: int, x: list[Any]) -> tuple[Any, Any]:
    """What a row that so many lanes share is multiplied with, and one over its length."""
    square = _sum(w, lanes, x, x)
    over = w.rsqrt(w.maximum(square, w.number(SMALLEST)))
    length = w.fmultiply(square, over)
    return w.reciprocal(w.fadd(length, w.number(LENGTH_EPSILON))), over


def activate_rows(w: Any, part: Part, x: Any, y: Any) -> None:
    """From rows of the product `[tokens, heads * size]` to those of q, k or v, for this lane."""
    rows, (_, unit_length) = part.rows, part.activation

    def some(own: list[Any]) -> None:
        loaded = [_load(w, rows, x, _addresses(w, rows, part.heads, x, row)) for row in own]
        for row, words in zip(own, loaded, strict=True):
            a, _ = after_silu(w, part.activation, _wide(w, rows, words))
            if unit_length:
                scale, _ = over_length(w, rows.lanes, a)
                a = [w.fmultiply(value, scale) for value in a]
            _store(w, rows, y, _addresses(w, rows, part.heads, y, row), a)

    _over_all(w, part, x.shape[0], some)


def gradient_of_rows(w: Any, part: Part, x: Any, d_y: Any, d_x: Any) -> None:
    """The gradient of `activate_rows`: of rows of the product, from that of q, k or v."""
    rows, (_, unit_length) = part.rows, part.activation

    def some(own: list[Any]) -> None:
        loaded = [
            [_load(w, rows, z, _addresses(w, rows, part.heads, z, row)) for z in (x, d_y)]
            for row in own
        ]
        for row, words in zip(own, loaded, strict=True):
            x_wide, d = (_wide(w, rows, z) for z in words)
            a, derivatives = after_silu(w, part.activation, x_wide)
            if unit_length:
                scale, over = over_length(w, rows.lanes, a)
                # Of a (||a|| + e)^-1: d scale - a (a . d) scale^2 / ||a||.
                along = w.fmultiply(w.fmultiply(scale, scale), over)
                along = w.negative(w.fmultiply(_sum(w, rows.lanes, a, d), along))
                d = [
                    w.fma(value, along, w.fmultiply(of_value, scale))
                    for value, of_value in zip(a, d, strict=True)
                ]
            d = [w.fmultiply(of_value, s) for of_value, s in zip(d, derivatives, strict=True)]
            _store(w, rows, d_x, _addresses(w, rows, part.heads, d_x, row), d)

    _over_all(w, part, x.shape[0], some)


def _over_all(w: Any, part: Part, tokens: int, some: Callable[[list[Any]], None]) -> None:
    """`some(rows)` for all rows that this lane works on."""
    rows, n_rows = part.rows, tokens * part.heads
    n = -(-n_rows * rows.lanes // (THREADS * rows.at_once))

    def body(i: Any, carry: Any) -> Any:
        first = w.multiply(i, rows.at_once)
        some([_row(w, rows, w.add(first, j), n_rows) for j in range(rows.at_once)])
        return carry

    w.loop(n, (), body)


def _kernel(
    name: str,
    program: Callable[..., None],
    parts: list[Part],
    tokens: int,
    of_block: Callable[[Part, dict[str, Any], Any], list[Any]],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
) -> dict[str, Any]:
    """Runs `program(w, part, *refs)` for blocks of tokens of each part; `of_block(part, refs,
    tokens)` are their refs."""
    sizes = [part.tokens(tokens) for part in parts]
    counts = [-(-tokens // size) for size in sizes]

    def body(index: Any, _: Any, ref: dict[str, Any]) -> None:
        start = 0
        for part, size, count in zip(parts, sizes, counts, strict=True):

            @pl.when((index >= start) & (index < start + count))
            def _(part: Part = part, size: int = size, start: int = start) -> None:
                # The last block has as many tokens as the others, some of them again.
                first = jnp.minimum((index - start) * size, tokens - size)
                refs = of_block(part, ref, pl.ds(first, size))
                inline(
                    lambda _, *refs: program(Warp(), part, *(Memory(x) for x in refs)),
                    *refs,
                    arg_types=(plgpu.RefType(),) * len(refs),
                )

            start += count

    return run_blocks(
        name,
        body,
        sum(counts),
        inputs,
        outputs,
        {},
        warpgroups=1,
        approximate=True,
        interpret=None,
    )


def _flat(x: Array) -> Array:
    """`[B * T, columns]`."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


@functools.cache
def _forward_call(split: Split) -> Callable[[Array], tuple[Array, ...]]:
    def call(x: Array) -> tuple[Array, ...]:
        batch, time, columns = x.shape
        parts = [s for s in split.parts(columns, x.dtype.itemsize) if s.name != "rest"]

        def of_block(part: Part, ref: dict[str, Any], tokens: Any) -> list[Any]:
            own = pl.ds(part.start, part.stop - part.start)
            return [ref["x"].at[tokens, own], ref[part.name].at[tokens]]

        results = _kernel(
            "e88_activation",
            activate_rows,
            parts,
            batch * time,
            of_block,
            {"x": _flat(x)},
            {
                s.name: jax.ShapeDtypeStruct((batch * time, s.stop - s.start), x.dtype)
                for s in parts
            },
        )
        return tuple(results[s.name].reshape(batch, time, s.heads, -1) for s in parts)

    return over_rows(call, ("b t c",), lambda *_: ("b t h n", "b t h n", "b t h v"), True)


@functools.cache
def _backward_call(split: Split, has_rest: bool) -> Callable[..., Array]:
    def call(x: Array, *d: Array) -> Array:
        parts = split.parts(x.shape[2], x.dtype.itemsize)
        given = {s.name: _flat(d_y) for s, d_y in zip(parts, d, strict=True)}

        def of_block(part: Part, ref: dict[str, Any], tokens: Any) -> list[Any]:
            own = pl.ds(part.start, part.stop - part.start)
            return [
                ref["x"].at[tokens, own],
                ref[part.name].at[tokens],
                ref["d_x"].at[tokens, own],
            ]

        flat = _flat(x)
        results = _kernel(
            "e88_activation_backward",
            gradient_of_rows,
            parts,
            flat.shape[0],
            of_block,
            {"x": flat, **given},
            {"d_x": jax.ShapeDtypeStruct(flat.shape, x.dtype)},
        )
        return results["d_x"].reshape(x.shape)

    axes = ("b t c", "b t h n", "b t h n", "b t h v", *(("b t r",) if has_rest else ()))
    return over_rows(call, axes, lambda *_: "b t c", True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(split: Split, x: Array) -> tuple[Array, Array, Array, Array]:
    """q, k, v and the rest of a product that has them side by side; differentiable once.

    Args:
        split: sizes, and what is done: SiLU, then division by the length plus 1e-6 (q and k).
        x: `[B, T, columns]`, float32 or bfloat16, that `split.unsupported` does not refuse.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]`, and the columns after theirs, in x's dtype.
    """
    q, k, v = _forward_call(split)(x)
    return q, k, v, x[:, :, split.columns :]


def _activate_forward(split: Split, x: Array) -> Any:
    return activate(split, x), x


def _activate_backward(split: Split, x: Array, d: tuple[Array, ...]) -> tuple[Array]:
    has_rest = x.shape[2] > split.columns
    return (_backward_call(split, has_rest)(x, *d[: 3 + has_rest]),)


activate.defvjp(_activate_forward, _activate_backward)
