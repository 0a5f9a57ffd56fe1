"""Instructions of the tensor cores, and addresses in shared memory, in MLIR.

Every function here is for the body of a `plgpu.inline_mgpu`.
"""

import itertools
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def constant(x: int) -> ir.Value:
    return arith.constant(i32(), x)


def add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, constant(y) if isinstance(y, int) else y)


def multiply(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, constant(y))


def divide(x: ir.Value, y: int) -> tuple[ir.Value, ir.Value]:
    """The quotient and the remainder."""
    return arith.divui(x, constant(y)), arith.remui(x, constant(y))


def equal(x: ir.Value, y: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, x, constant(y))


def warp_and_lane() -> tuple[ir.Value, ir.Value]:
    return divide(arith.remui(mgpu.thread_idx(), constant(128)), 32)


def pointer(address: ir.Value) -> ir.Value:
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)


class SharedMemory:
    """Byte addresses into a reference."""

    def __init__(self, ref: ir.Value) -> None:
        self.type = ir.MemRefType(ref.type)
        self.bytes = mgpu.bitwidth(self.type.element_type) // 8
        strides, _ = self.type.get_strides_and_offset()
        self.strides = [stride * self.bytes for stride in strides]
        self.base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))

    def address(self, *index: ir.Value | int) -> ir.Value:
        address, offset = self.base, 0
        for i, stride in zip(index, self.strides, strict=True):
            if isinstance(i, int):
                offset += i * stride
            else:
                address = arith.addi(address, multiply(i, stride))
        return add(address, offset) if offset else address


def load_transposed(address: ir.Value, n: int) -> list[Any]:
    """n 8x8 matrices of 16 bits, transposed; each 8 lanes give the addresses of 8 rows."""
    registers = ", ".join(f"${i}" for i in range(n))
    # Other lanes write this memory between two loads, so a load must stay where it is.
    results: Any = llvm.inline_asm(
        llvm.StructType.get_literal([i32()] * n),
        [address],
        f"ldmatrix.sync.aligned.m8n8.x{n}.trans.shared.b16 {{{registers}}}, [${n}];",
        ",".join(["=r"] * n) + ",r,~{memory}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32(), results, [i]) for i in range(n)]


def multiply_add(acc: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """acc + a @ b: `[16, 8] + [16, 8 len(b)] @ [8 len(b), 8]` of one warp, in bfloat16.

    Lane 4 g + c holds of acc: `[g, 2c], [g, 2c + 1], [g + 8, 2c], [g + 8, 2c + 1]`; of a, in pairs:
    `[g, 2c], [g + 8, 2c]` and, where b has two registers, `[g, 2c + 8], [g + 8, 2c + 8]`; of b, in
    pairs along its rows: `[2c, g]` and `[2c + 8, g]`.
    """
    counter = itertools.count()
    lists = [
        "{" + ", ".join(f"${next(counter)}" for _ in range(n)) + "}" for n in (4, len(a), len(b), 4)
    ]
    shape = f"m16n8k{8 * len(b)}"
    f32 = ir.F32Type.get()
    results: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *acc],
        f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32 {', '.join(lists)};",
        ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4),
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, results, [i]) for i in range(4)]
