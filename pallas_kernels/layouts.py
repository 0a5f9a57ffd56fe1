"""Where the state of a block lives in registers, and how its rows and columns reach it.

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
from jaxlib.mlir.dialects import arith, vector

WARPS = 4
COLUMN_LANES = 8
"""Lanes of a warp side by side on neighbouring columns; the others split the keys of each."""
KEY_LANES = 4

STATE = (0, 1, 2)
VALUES = (0, 1)
KEYS = (0, 2)
HEADS = (0,)


def keys_per_vector(n_keys: int) -> int:
    """Neighbouring keys that a lane holds and loads at once."""
    for vector in (8, 4, 2):
        if n_keys % (KEY_LANES * vector) == 0:
            return vector
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
    interpret: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.values, self.keys

    @functools.cached_property
    def _layouts(self) -> dict[tuple[int, ...], Any]:
        vector = keys_per_vector(self.keys)
        warp_tile = (1, COLUMN_LANES, KEY_LANES * vector)
        block_tile = (self.heads, COLUMN_LANES * WARPS // self.heads, KEY_LANES * vector)
        # Columns vary fastest over lanes: 8 lanes read one address of k, and rows of the history
        # that are padded to an odd number of 16 bytes fall on different banks.
        state = _tiled((block_tile, warp_tile, (vector,)), (-7, -6), (-2, -3), -1)
        return {
            STATE: state,
            VALUES: state.reduce(2),
            KEYS: state.reduce(1),
            HEADS: state.reduce(2).reduce(1),
        }

    def cast(self, x: Array, axes: tuple[int, ...]) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, self._layouts[axes])

    def load(self, ref: Any, axes: tuple[int, ...]) -> Array:
        """What `ref`, of the axes given, holds, as float32 in registers."""
        if self.interpret:
            return ref[...].astype(jnp.float32)
        return _load(ref, self._layouts[axes]).astype(jnp.float32)

    def store(self, ref: Any, x: Array, axes: tuple[int, ...]) -> None:
        """Writes x, in the dtype of `ref`; both have the axes given."""
        x = x.astype(ref.dtype)
        if self.interpret:
            ref[...] = x
        else:
            _store(ref, x, self._layouts[axes])

    def lane_sums(self, x: Array, axes: tuple[int, ...]) -> Array:
        """`[heads, lanes]`: numbers that add up to the sum of x over each head, one for each lane.

        Leaves the sum over lanes for later, when it can be done for many steps at once.
        """
        heads, lanes = shape = self.lane_sums_shape
        if self.interpret:
            total = jnp.sum(x.reshape(heads, -1), axis=1, keepdims=True)
            return jnp.pad(total, ((0, 0), (0, lanes - 1)))
        layout = self._lane_layout
        share = 1 if axes == STATE else 1 / KEY_LANES  # lanes that split the keys hold the same

        @plgpu.inline_mgpu(
            arg_types=(self._layouts[axes],),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout),
        )
        def add(_: Any, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
            return _sum_registers(x, shape, layout.to_mgpu(), share)

        return add(x)

    @property
    def lane_sums_shape(self) -> tuple[int, int]:
        return self.heads, 32 * WARPS // self.heads

    @functools.cached_property
    def _lane_layout(self) -> Any:
        return _tiled((self.lane_sums_shape, (1, 32), (1,)), (-5, -4), (-2,), -1)

    def store_lane_sums(self, ref: Any, x: Array) -> None:
        if self.interpret:
            ref[...] = x
        else:
            _store(ref, x, self._lane_layout)

    def add_lanes(self, ref: Any, target: Any) -> None:
        """Adds `[steps, heads, lanes]` over lanes, into `[steps, heads]`."""
        if self.interpret:
            target[...] = jnp.sum(ref[...], axis=2)
            return
        _, lanes = self.lane_sums_shape
        vector = lanes // 32
        # Warps share out the steps, whichever warp wrote them.
        layout = _tiled(((WARPS, 1, lanes), (vector,)), (-4,), (-2,), -1)
        x = _load(ref, layout)
        _store(target, jnp.sum(x, axis=2), layout.reduce(2))

    def _shape(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    def spread(self, x: Array, axes: tuple[int, ...], over: tuple[int, ...] = STATE) -> Array:
        """`x`, which has the axes given, repeated along the rest of `over`."""
        positions = tuple(over.index(axis) for axis in axes)
        return self.cast(lax.broadcast_in_dim(x, self._shape(over), positions), over)

    def full(self, value: float, axes: tuple[int, ...] = STATE) -> Array:
        return self.cast(jnp.full(self._shape(axes), value, jnp.float32), axes)


def _load(ref: Any, layout: Any) -> Array:
    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout),
    )
    def load(_: Any, ref: Any) -> mgpu.FragmentedArray:
        return mgpu.FragmentedArray.load_tiled(
            _as_one_tile(ref), swizzle=16, layout=layout.to_mgpu(), optimized=False
        )

    return load(ref)


def _store(ref: Any, x: Array, layout: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_: Any, ref: Any, x: mgpu.FragmentedArray) -> None:
        x.store_tiled(_as_one_tile(ref), swizzle=16, optimized=False)

    store(ref, x)


def _as_one_tile(ref: Any) -> Any:
    """A view of `[a, b]`, which need not be contiguous, as `[1, 1, a, b]`."""
    for _ in range(ref.type.rank):
        ref = mgpu.memref_unsqueeze(ref, 0)
    return ref


def _tiled(tiling: Any, warp_dims: Any, lane_dims: Any, vector_dim: int) -> Any:
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiling), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _sum_registers(x: Any, shape: tuple[int, ...], layout: Any, scale: float) -> Any:
    """The sum of what each lane holds of x, times scale, as one register of `layout`."""
    f32 = ir.F32Type.get()
    total = None
    for register in x.registers.flat:
        for i in range(ir.VectorType(register.type).shape[0]):
            value = vector.extract(
                register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
            )
            total = value if total is None else arith.addf(total, value)
    total = arith.mulf(total, mgpu.c(scale, f32))
    register = vector.broadcast(ir.VectorType.get((1,), f32), total)
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    registers.fill(register)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
