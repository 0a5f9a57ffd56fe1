"""Names for what JAX leaves untyped."""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pallas_kernels.interpreter.jax_interpreter import InterpretGPUParams

Ref: TypeAlias = Any
"""A reference of a Pallas kernel to shared or device memory."""
Barrier: TypeAlias = Any
"""A reference to mbarriers."""
Index: TypeAlias = Any
"""A position along an axis: a Python int or a traced int32."""
Reg: TypeAlias = Any
"""A register of each lane, 32 bits wide: an MLIR value, a Python int, or in tests a NumPy array."""
Address: TypeAlias = Any
"""Bytes from the start of a `Memory`, as `LaneOps.address` gives them."""
Layout: TypeAlias = Any
"""A tiled layout of Pallas: which lane holds which elements of an array in registers."""
Scratch: TypeAlias = dict[str, Any]
"""Shared memory and barriers of a block by name: `plgpu.SMEM` and `plgpu.Barrier`."""
ArrayTree: TypeAlias = Any
"""An array, None, or a tuple of such trees."""
AxesTree: TypeAlias = Any
"""A tree like that of arrays, with a string such as "b t h n" in place of each."""
Interpret: TypeAlias = "InterpretGPUParams | None"
"""Parameters of Pallas's interpreter, or None to run on a GPU."""
