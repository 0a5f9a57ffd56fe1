"""What the kernels read and write: the op's arrays, laid out for bulk copies.

Zero heads, keys and columns are exact. Zero steps are not: a kernel skips those past the time that
it is told. Past the end of an array the copy engine reads zeros, so that most need no padding.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.blocks import scalars_at_once
from pallas_kernels.cell import Step
from pallas_kernels.geometry import KEYS_MULTIPLE, Geometry, round_up
from pallas_kernels.layouts import HEADS, KEYS, VALUES, Registers


class Inputs(NamedTuple):
    """What every step of the op reads, as the op takes it."""

    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]; for the backward kernel the errors, float32
    decay: Array  # [B, T, H] float32
    write_gate: Array | None  # [B, T, H] float32
    starts: Array | None  # [B, T] bool: the step starts from a zero state
    live: Array | None  # [B, T] bool: where it does not hold, the state stays


class Operands(NamedTuple):
    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]; for the backward kernel the errors, float32
    scalars: Array  # [B, H, S, T] float32: decay, then those given of the write gate, keep and live
    has_write_gate: bool
    has_keep: bool
    has_live: bool
    time: int  # steps; the arrays may have more, which the kernels skip


def _padded(x: Array, *multiples: int) -> Array:
    """x with zeros after it, so that each axis is a multiple of the number given for it."""
    widths = [
        (0, round_up(size, multiple) - size)
        for size, multiple in zip(x.shape, multiples, strict=True)
    ]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _columns(x: Array, multiple: int, geometry: Geometry, interpret: Any) -> Array:
    """`[B, T, H, columns]` for bulk copies of whole blocks."""
    # The interpreter of JAX 0.10.2 does not read past the end of an axis. The copy engine does,
    # and finds zeros; its rows must begin at 16 bytes.
    if interpret is None:
        return _padded(x, 1, 1, 1, 16 // x.dtype.itemsize)
    short = x.shape[1] < geometry.chunk
    return _padded(x, 1, geometry.chunk if short else 1, geometry.heads, multiple)


def prepare(x: Inputs, geometry: Geometry, interpret: Any) -> Operands:
    """The kernels' operands; q, k and v are copied only where they cannot be read as they are."""
    time = x.q.shape[1]
    decay, keep = x.decay, None
    if x.starts is not None:
        starts = jnp.broadcast_to(x.starts[:, :, None], decay.shape)
        decay = jnp.where(starts, jnp.zeros_like(decay), decay)
        keep = 1 - starts.astype(jnp.float32)
    live = None
    if x.live is not None:
        live = jnp.broadcast_to(x.live[:, :, None], decay.shape).astype(jnp.float32)
    rows = [row_major(row) for row in (decay, x.write_gate, keep, live) if row is not None]
    scalars = _padded(jnp.transpose(jnp.stack(rows), (1, 3, 0, 2)), 1, geometry.heads, 1, 1)
    # The last chunk's copy begins inside the array and must end there.
    ends = round_up(time, geometry.chunk) + scalars_at_once(geometry.chunk)
    scalars = jnp.pad(scalars, ((0, 0), (0, 0), (0, 0), (0, ends - time)))
    return Operands(
        _columns(x.q, KEYS_MULTIPLE, geometry, interpret),
        _columns(x.k, KEYS_MULTIPLE, geometry, interpret),
        prepare_values(x.v, geometry, interpret),
        scalars,
        has_write_gate=x.write_gate is not None,
        has_keep=keep is not None,
        has_live=live is not None,
        time=time,
    )


def prepare_values(x: Array, geometry: Geometry, interpret: Any) -> Array:
    """v, the errors or the gradient of out, `[B, T, H, V]`, for the kernels."""
    return _columns(x, geometry.values, geometry, interpret)


def prepare_states(states: Array, geometry: Geometry) -> Array:
    """States `[B, H, ..., V, N]` for the kernels, which read them without the copy engine."""
    between = (1,) * (states.ndim - 4)
    return _padded(states, 1, geometry.heads, *between, geometry.values, KEYS_MULTIPLE)


def row_major(x: Array) -> Array:
    """x, laid out with its last axis contiguous.

    The kernels read and write scalars with time last. Left to itself, XLA takes that layout for
    what these are computed from too: for a product that gives q, k and v with them, so that these
    are copied.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def cut(x: Array, *sizes: int) -> Array:
    """x without its padding: the first so many of its last axes."""
    return x[(..., *(slice(size) for size in sizes))]


def resized(x: Array, shape: tuple[int, ...]) -> Array:
    """x, cut or with zeros after it, so that it has this shape."""
    x = x[tuple(slice(size) for size in shape)]
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])


def load_step(
    registers: Registers, x: Operands, k: Any, v: Any, scalars: Any, t: Any, first: int
) -> Step:
    """What a step reads, from row t of a chunk of k and v and row `t - first` of its scalars."""

    def scalar(i: int) -> Array:
        return registers.load(scalars.at[:, i, t - first], HEADS)

    return Step(
        k=registers.load(k.at[t], KEYS),
        v=registers.load(v.at[t], VALUES),
        decay=scalar(0),
        write_gate=scalar(1) if x.has_write_gate else None,
        keep=scalar(1 + x.has_write_gate) if x.has_keep else None,
        live=scalar(1 + x.has_write_gate + x.has_keep) if x.has_live else None,
    )
