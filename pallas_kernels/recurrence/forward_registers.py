"""A block's state in registers, in the forward kernel: which lane holds what, sums over keys."""

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

from pallas_kernels.common.aliases import Interpret, Layout, Ref, Reg
from pallas_kernels.common.mosaic import (
    elements_of,
    inline,
    load_tiled,
    store_tiled,
    tiled_layout,
)
from pallas_kernels.common.sizes import WARPS
from pallas_kernels.recurrence.block import HEADS, KEYS, STATE, VALUES, Axes
from pallas_kernels.recurrence.tuning_config import COLUMN_LANES, KEY_LANES, TuningConfig


def keys_per_vector(n_keys: int, itemsize: int) -> int:
    """Neighbouring keys that a lane holds and loads at once: up to 16 bytes."""
    for n in (8, 4, 2)[itemsize // 4 :]:
        if n_keys % (KEY_LANES * n) == 0:
            return n
    raise ValueError(f"keys must be a multiple of {2 * KEY_LANES}, got {n_keys}.")


def registers_of(config: TuningConfig, keys: int, dtype: Any, interpret: Interpret) -> "Registers":
    """The registers of a block of this config; under the interpreter, whole arrays."""
    sizes = config.heads, config.values, keys, jnp.dtype(dtype).itemsize
    if interpret is None:
        return Registers(*sizes)
    from pallas_kernels.interpreter.recurrence import ArrayRegisters

    return ArrayRegisters(*sizes)


@dataclasses.dataclass(frozen=True)
class Registers:
    """The layout of a block's state, and of what is spread over it or summed from it.

    Warps split the heads, and the columns of a head where there are fewer heads than warps. In a
    warp, 8 lanes hold neighbouring columns and 4 lanes split the keys of each, so that a sum over
    keys takes 2 shuffles.
    """

    heads: int
    values: int
    keys: int
    itemsize: int  # of the inputs, in bytes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.values, self.keys

    @functools.cached_property
    def _layouts(self) -> dict[Axes, Layout]:
        vector = keys_per_vector(self.keys, self.itemsize)
        warp_tile = (1, COLUMN_LANES, KEY_LANES * vector)
        block_tile = (self.heads, COLUMN_LANES * WARPS // self.heads, KEY_LANES * vector)
        state = tiled_layout((block_tile, warp_tile, (vector,)), (-7, -6), (-3, -2), -1)
        return {
            STATE: state,
            VALUES: state.reduce(2),
            KEYS: state.reduce(1),
            HEADS: state.reduce(2).reduce(1),
        }

    def cast(self, x: Array, axes: Axes) -> Array:
        """x in the layout of these axes."""
        return plgpu.layout_cast(x, self._layouts[axes])

    def load(self, ref: Ref, axes: Axes) -> Array:
        """The elements of `ref`, which has these axes, in its dtype."""
        return load_tiled(ref, self._layouts[axes])

    def wide(self, x: Array, axes: Axes) -> Array:
        """x in float32."""
        if x.dtype == jnp.float32:
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

        The shuffles of all the ys are interleaved, so that they hide each other's latency.
        """
        ys = tuple(self.spread(y, KEYS) for y in ys)
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

    def store(self, ref: Ref, x: Array, axes: Axes) -> None:
        """Writes x to `ref` in its dtype; both have these axes."""
        store_tiled(ref, x.astype(ref.dtype), self._layouts[axes])

    def _shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    def spread(self, x: Array, axes: Axes, over: Axes = STATE) -> Array:
        """x, which has `axes`, broadcast along the rest of `over`."""
        positions = tuple(over.index(axis) for axis in axes)
        return self.cast(lax.broadcast_in_dim(x, self._shape(over), positions), over)

    def full(self, value: float, axes: Axes = STATE) -> Array:
        return self.cast(jnp.full(self._shape(axes), value, jnp.float32), axes)


def _as_vector(value: Reg) -> Any:
    return vector.broadcast(ir.VectorType.get((1,), value.type), value)


def _dot(registers: list[tuple[Any, Any]]) -> Reg:
    """The dot product of pairs of float32 vectors, in two chains of FMAs to halve the latency."""
    pairs = [
        pair for x, y in registers for pair in zip(elements_of(x), elements_of(y), strict=True)
    ]
    chains: list[Reg] = [None, None]
    for i, (x, y) in enumerate(pairs):
        chain = chains[i % 2]
        chains[i % 2] = arith.mulf(x, y) if chain is None else math.fma(x, y, chain)
    return chains[0] if chains[1] is None else arith.addf(*chains)


def _widen_bfloat16(register: Any) -> Any:
    """A vector of bfloat16 as float32, one instruction per element."""
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
