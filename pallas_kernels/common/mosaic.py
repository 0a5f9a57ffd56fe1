"""Mosaic GPU inside of a Pallas kernel: tiled layouts, loads and stores, inline MLIR."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.common.aliases import Layout, Ref


def inline(
    f: Callable[..., Any], *args: Any, arg_types: Sequence[Any] = (), return_type: Any = None
) -> Any:
    """Emits `f(context, *args)`, which works on MLIR values and fragmented arrays, here."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(f)(*args)


def load_tiled(ref: Ref, layout: Layout) -> Array:
    """The elements of `ref` in registers, in this layout."""

    def load(_: Any, ref: ir.Value) -> mgpu.FragmentedArray:
        return mgpu.FragmentedArray.load_tiled(
            _as_one_tile(ref), swizzle=16, layout=layout.to_mgpu(), optimized=False
        )

    loaded = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout)
    return inline(load, ref, arg_types=(plgpu.RefType(),), return_type=loaded)


def store_tiled(ref: Ref, x: Array, layout: Layout) -> None:
    """Writes registers in this layout to `ref`."""

    def store(_: Any, ref: ir.Value, x: mgpu.FragmentedArray) -> None:
        x.store_tiled(_as_one_tile(ref), swizzle=16, optimized=False)

    inline(store, ref, x, arg_types=(plgpu.RefType(), layout))


def _as_one_tile(ref: Any) -> Any:
    """A view of `[a, b]`, which need not be contiguous, as `[1, 1, a, b]`."""
    for _ in range(ref.type.rank):
        ref = mgpu.memref_unsqueeze(ref, 0)
    return ref


def tiled_layout(tiling: Any, warp_dims: Any, lane_dims: Any, vector_dim: int) -> Layout:
    """The canonical form of a tiled layout."""
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiling), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def elements_of(register: Any) -> list[Any]:
    """The scalars of an MLIR vector."""
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(ir.VectorType(register.type).shape[0])
    ]
