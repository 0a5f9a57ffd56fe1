"""Where the state of a block of the forward kernel lives in registers, and what makes layouts.

A block is one warpgroup of 4 warps. It holds, for `heads` heads, `values` columns of the state,
written `[heads, values, keys]` (the transpose of the op's `[N, V]`: V is the slow axis).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

WARPS = 4
THREADS = 32 * WARPS
COLUMN_LANES = 8
"""Lanes of a warp side by side on neighbouring columns; the others split the keys of each."""
KEY_LANES = 4

STATE = (0, 1, 2)
VALUES = (0, 1)
KEYS = (0, 2)
HEADS = (0,)


def keys_per_vector(n_keys: int, itemsize: int) -> int:
    """Neighbouring keys that a lane holds and loads at once: up to 16 bytes."""
    for n in (8, 4, 2)[itemsize // 4 :]:
        if n_keys % (KEY_LANES * n) == 0:
            return n
    raise ValueError(f"keys must be a multiple of {2 * KEY_LANES}, got {n_keys}.")


@dataclasses.dataclass(frozen=True)
class Registers:
    """The layout of a block's state and of whatever is spread over it or summed from it.

    Arrays are named by the axes that they share with the state: STATE, VALUES, KEYS or HEADS.
    Warps split the heads, and the columns of a head where there are fewer heads than warps. In a
    warp, 8 lanes hold neighbouring columns and 4 lanes split the keys of each, so that a sum over
    keys takes 2 shuffles. `interpret` is for the interpreter, which knows no layouts.
    """

    heads: int
    values: int
    keys: int
    itemsize: int  # of the inputs, in bytes
    interpret: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.values, self.keys

    @functools.cached_property
    def _layouts(self) -> dict[tuple[int, ...], Any]:
        vector = keys_per_vector(self.keys, self.itemsize)
        warp_tile = (1, COLUMN_LANES, KEY_LANES * vector)
        block_tile = (self.heads, COLUMN_LANES * WARPS // self.heads, KEY_LANES * vector)
        state = tiled((block_tile, warp_tile, (vector,)), (-7, -6), (-3, -2), -1)
        return {
            STATE: state,
            VALUES: state.reduce(2),
            KEYS: state.reduce(1),
            HEADS: state.reduce(2).reduce(1),
        }

    def cast(self, x: Array, axes: tuple[int, ...]) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, self._layouts[axes])

    def load(self, ref: Any, axes: tuple[int, ...]) -> Array:
        """What `ref`, of the axes given, holds, in its dtype."""
        return ref[...] if self.interpret else load_tiled(ref, self._layouts[axes])

    def wide(self, x: Array, axes: tuple[int, ...]) -> Array:
        """x in float32."""
        if self.interpret or x.dtype == jnp.float32:
            return x.astype(jnp.float32)
        layout = self._layouts[axes]

        def widen(_: Any, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
            registers = np.empty(x.registers.shape, dtype=object)
            for index, register in np.ndenumerate(x.registers):
                registers[index] = _widen_bfloat16(register)
            return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

        wide = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout)
        return inline(widen, x, arg_types=(layout,), return_type=wide)

    def sums_over_keys(self, x: Array, *ys: Array) -> tuple[Array, ...]:
        """VALUES: for each y of KEYS, the sum of x y over keys. x is a STATE, all are float32.

        The sums for all the ys are interleaved: their shuffles wait for each other's.
        """
        ys = tuple(self.spread(y, KEYS) for y in ys)
        if self.interpret:
            return tuple(jnp.sum(x * y, axis=2) for y in ys)
        state, values = self._layouts[STATE], self._layouts[VALUES]
        result = plgpu.ShapeDtypeStruct(self._shape(VALUES), jnp.float32, values)

        def add(_: Any, x: Any, *ys: Any) -> Any:
            over_keys = (False,) * 3 + tuple(x.layout.tiling.tile_dimension(2))
            over_keys = over_keys[-x.registers.ndim :]
            kept = tuple(1 if r else n for r, n in zip(over_keys, x.registers.shape, strict=True))
            summed = tuple(n if r else 1 for r, n in zip(over_keys, x.registers.shape, strict=True))
            sums = []
            for y in ys:
                for index in np.ndindex(*kept):
                    here = [
                        tuple(i + j for i, j in zip(index, offset, strict=True))
                        for offset in np.ndindex(*summed)
                    ]
                    sums.append(_dot([(x.registers[i], y.registers[i]) for i in here]))
            for stride in (1, 2):
                others = [mgpu.utils.shfl_bfly(value, stride) for value in sums]
                sums = [arith.addf(a, b) for a, b in zip(sums, others, strict=True)]
            layout = values.to_mgpu()
            shape = layout.registers_shape(self._shape(VALUES))
            per_y = np.array([None] * len(sums), dtype=object)
            per_y[:] = [_as_vector(value) for value in sums]
            return tuple(
                mgpu.FragmentedArray(
                    _registers=registers.reshape(shape), _layout=layout, _is_signed=None
                )
                for registers in np.split(per_y, len(ys))
            )

        types = (state,) * (1 + len(ys))
        return inline(add, x, *ys, arg_types=types, return_type=(result,) * len(ys))

    def store(self, ref: Any, x: Array, axes: tuple[int, ...]) -> None:
        """Writes x, in the dtype of `ref`; both have the axes given."""
        x = x.astype(ref.dtype)
        if self.interpret:
            ref[...] = x
        else:
            store_tiled(ref, x, self._layouts[axes])

    def _shape(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    def spread(self, x: Array, axes: tuple[int, ...], over: tuple[int, ...] = STATE) -> Array:
        """`x`, which has the axes given, repeated along the rest of `over`."""
        positions = tuple(over.index(axis) for axis in axes)
        return self.cast(lax.broadcast_in_dim(x, self._shape(over), positions), over)

    def full(self, value: float, axes: tuple[int, ...] = STATE) -> Array:
        return self.cast(jnp.full(self._shape(axes), value, jnp.float32), axes)


def inline(f: Any, *args: Any, arg_types: Any = (), return_type: Any = None) -> Any:
    """f, in terms of Mosaic GPU, of the arguments here."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(f)(*args)


def load_tiled(ref: Any, layout: Any) -> Array:
    def load(_: Any, ref: Any) -> mgpu.FragmentedArray:
        return mgpu.FragmentedArray.load_tiled(
            _as_one_tile(ref), swizzle=16, layout=layout.to_mgpu(), optimized=False
        )

    loaded = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout)
    return inline(load, ref, arg_types=(plgpu.RefType(),), return_type=loaded)


def store_tiled(ref: Any, x: Array, layout: Any) -> None:
    def store(_: Any, ref: Any, x: mgpu.FragmentedArray) -> None:
        x.store_tiled(_as_one_tile(ref), swizzle=16, optimized=False)

    inline(store, ref, x, arg_types=(plgpu.RefType(), layout))


def _as_one_tile(ref: Any) -> Any:
    """A view of `[a, b]`, which need not be contiguous, as `[1, 1, a, b]`."""
    for _ in range(ref.type.rank):
        ref = mgpu.memref_unsqueeze(ref, 0)
    return ref


def tiled(tiling: Any, warp_dims: Any, lane_dims: Any, vector_dim: int) -> Any:
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiling), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def elements_of(register: Any) -> list[Any]:
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def _as_vector(value: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((1,), value.type), value)


def _dot(registers: list[tuple[Any, Any]]) -> Any:
    """The sum of the products of pairs of float32 registers, in two chains to halve the wait."""
    pairs = [
        pair for x, y in registers for pair in zip(elements_of(x), elements_of(y), strict=True)
    ]
    chains: list[Any] = [None, None]
    for i, (x, y) in enumerate(pairs):
        chain = chains[i % 2]
        chains[i % 2] = arith.mulf(x, y) if chain is None else math.fma(x, y, chain)
    return chains[0] if chains[1] is None else arith.addf(*chains)


def _widen_bfloat16(register: Any) -> Any:
    """A register of bfloat16 as float32, in one instruction for each element."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    n = ir.VectorType(register.type).shape[0]
    wide = ir.VectorType.get((n,), f32)
    if n % 2:
        return arith.extf(wide, register)
    pairs = vector.bitcast(ir.VectorType.get((n // 2,), i32), register)
    values = []
    for pair in elements_of(pairs):
        low = arith.shli(pair, mgpu.c(16, i32))
        high = arith.andi(pair, mgpu.c(-(1 << 16), i32))
        values += [arith.bitcast(f32, low), arith.bitcast(f32, high)]
    return vector.from_elements(wide, values)
