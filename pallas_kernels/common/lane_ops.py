"""Instructions of a lane, as MLIR: what the lane programs of the kernels are written in.

A value is a 32-bit register of a lane: an integer or a float32. A lane program takes the `LaneOps`
that emits its instructions, so that `tests/reference/lane_ops_in_numpy.py` runs it without a GPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, scf, vector

from pallas_kernels.common.aliases import Address, Reg
from pallas_kernels.common.sizes import LANES, THREADS


class Memory:
    """Shared or device memory behind a reference; addresses into it are in bytes."""

    def __init__(self, ref: ir.Value) -> None:
        self.type = ir.MemRefType(ref.type)
        self.shape = self.type.shape
        self.itemsize = mgpu.bitwidth(self.type.element_type) // 8
        strides, _ = self.type.get_strides_and_offset()
        self.strides = [stride * self.itemsize for stride in strides]
        self.pointer = mgpu.utils.memref_ptr(ref)


@dataclasses.dataclass(frozen=True)
class _Address:
    """Two summands; the constant one becomes the immediate offset of the load or store."""

    dynamic: Reg
    constant: int


class LaneOps:
    """Instructions of the lanes of a warp."""

    def __init__(self, thread_of_block: Reg | None = None) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        self.f32 = ir.F32Type.get()
        index = mgpu.thread_idx() if thread_of_block is None else thread_of_block
        self.warpgroup, self.thread = self.divide(index, THREADS)
        self.warp, self.lane = self.divide(self.thread, LANES)  # warp of the warpgroup

    def anew(self) -> "LaneOps":
        """The same, but LLVM does not see that it is: what follows from the lane's number is
        computed here, not ahead of a loop, where it would take registers all along."""
        index, asm = mgpu.thread_idx(), "mov.b32 $0, $1;"
        return LaneOps(llvm.inline_asm(self.i32, [index], asm, "=r,r", has_side_effects=True))

    def _int(self, x: Reg) -> Reg:
        return arith.constant(self.i32, x) if isinstance(x, int) else x

    def _u(self, operation: Callable[..., Reg], x: Reg, y: Reg) -> Reg:
        return operation(self._int(x), self._int(y))

    def _asm(self, types: Any, instruction: str, kinds: str, *args: Reg) -> Reg:
        return llvm.inline_asm(types, list(args), instruction, kinds, has_side_effects=False)

    # Integers. Python integers give Python integers.

    def add(self, x: Reg, y: Reg) -> Reg:
        if isinstance(x, int) and isinstance(y, int):
            return x + y
        if isinstance(x, _Address) or isinstance(y, _Address):
            x, y = self._split(x), self._split(y)
            return _Address(self.add(x.dynamic, y.dynamic), x.constant + y.constant)
        if isinstance(y, int) and y == 0:
            return x
        return self._u(arith.addi, x, y)

    def multiply(self, x: Reg, y: Reg) -> Reg:
        if isinstance(x, int) and isinstance(y, int):
            return x * y
        return self._u(arith.muli, x, y)

    def divide(self, x: Reg, y: int) -> tuple[Reg, Reg]:
        """Quotient and remainder of unsigned integers."""
        if isinstance(x, int):
            return divmod(x, y)
        return self._u(arith.divui, x, y), self._u(arith.remui, x, y)

    def minimum(self, x: Reg, y: Reg) -> Reg:
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        return self._u(arith.minui, x, y)

    def bits_and(self, x: Reg, y: Reg) -> Reg:
        return self._u(arith.andi, x, y)

    def bits_xor(self, x: Reg, y: Reg) -> Reg:
        return self._u(arith.xori, x, y)

    def shift_left(self, x: Reg, n: int) -> Reg:
        return self._u(arith.shli, x, n)

    def equal(self, x: Reg, y: Reg) -> Reg:
        return arith.cmpi(arith.CmpIPredicate.eq, self._int(x), self._int(y))

    def less(self, x: Reg, y: Reg) -> Reg:
        return arith.cmpi(arith.CmpIPredicate.ult, self._int(x), self._int(y))

    def select(self, condition: Reg, x: Reg, y: Reg) -> Reg:
        return arith.select(condition, self._int(x), self._int(y))

    def permute_bytes(self, low: Reg, high: Reg, selector: Reg) -> Reg:
        """`prmt`: 4 of the 8 bytes of `high` and `low`, named by the selector's 4 hex digits."""
        asm = "prmt.b32 $0, $1, $2, $3;"
        args = self._int(low), self._int(high), self._int(selector)
        return self._asm(self.i32, asm, "=r,r,r,r", *args)

    # Floating point.

    def number(self, x: float) -> Reg:
        return arith.constant(self.f32, x)

    def as_float(self, bits: Reg) -> Reg:
        return arith.bitcast(self.f32, bits)

    def as_bits(self, x: Reg) -> Reg:
        return arith.bitcast(self.i32, x)

    def fadd(self, x: Reg, y: Reg) -> Reg:
        return arith.addf(x, y)

    def fmultiply(self, x: Reg, y: Reg) -> Reg:
        return arith.mulf(x, y)

    def negative(self, x: Reg) -> Reg:
        return arith.negf(x)

    def fma(self, x: Reg, y: Reg, z: Reg) -> Reg:
        return math.fma(x, y, z)

    def tanh(self, x: Reg, approximate: bool) -> Reg:
        if approximate:
            return self._asm(self.f32, "tanh.approx.f32 $0, $1;", "=f,f", x)
        return math.tanh(x)

    def maximum(self, x: Reg, y: Reg) -> Reg:
        return arith.maximumf(x, y)

    def exp2(self, x: Reg) -> Reg:
        """2^x, within 2 units in the last place."""
        return self._asm(self.f32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", x)

    def reciprocal(self, x: Reg) -> Reg:
        return self._asm(self.f32, "rcp.approx.ftz.f32 $0, $1;", "=f,f", x)

    def rsqrt(self, x: Reg) -> Reg:
        """1 / sqrt(x), with a relative error of at most 2^-22."""
        return self._asm(self.f32, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", x)

    def pack_bf16(self, low: Reg, high: Reg) -> Reg:
        """Two float32 rounded to bfloat16, in one register."""
        return self._asm(self.i32, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", high, low)

    def mma_bf16(self, acc: Sequence[Reg], a: Sequence[Reg], b: Reg) -> list[Reg]:
        """acc + a @ b: `[16, 8] + [16, 8] @ [8, 8]` of a warp, a and b in bfloat16.

        Lane 4 g + c holds of acc: `[g, 2c], [g, 2c + 1], [g + 8, 2c], [g + 8, 2c + 1]`; of a, in
        pairs: `[g, 2c], [g + 8, 2c]`; of b, in a pair along its rows: `[2c, g]`.
        Source: PTX ISA, matrix fragments for mma.m16n8k8.
        """
        return self._mma("m16n8k8.row.col.f32.bf16.bf16.f32", acc, a, b)

    def mma_tf32(self, acc: Sequence[Reg], a: Sequence[Reg], b: Reg) -> list[Reg]:
        """acc + a @ b: `[16, 8] + [16, 4] @ [4, 8]`, a and b in float32 truncated to tf32.

        Lane 4 g + c holds of a: `[g, c], [g + 8, c]`; of b: `[c, g]`.
        Source: PTX ISA, matrix fragments for mma.m16n8k4.
        """
        bits = [self.as_bits(x) for x in a]
        return self._mma("m16n8k4.row.col.f32.tf32.tf32.f32", acc, bits, self.as_bits(b))

    def _mma(self, kind: str, acc: Sequence[Reg], a: Sequence[Reg], b: Reg) -> list[Reg]:
        results = self._asm(
            llvm.StructType.get_literal([self.f32] * 4),
            f"mma.sync.aligned.{kind} {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, {{$7, $8, $9, $10}};",
            ",".join(["=f"] * 4 + ["r"] * 3 + ["f"] * 4),
            *(*a, b, *acc),
        )
        return [llvm.extractvalue(self.f32, results, [i]) for i in range(4)]

    def shuffle_xor(self, x: Reg, distance: int) -> Reg:
        """`shfl.bfly`: x of the lane whose number differs in this bit."""
        return mgpu.utils.shfl_bfly(x, distance)

    def shuffle_from(self, x: Reg, lane: int) -> Reg:
        """`shfl.idx`: x of this lane, on every lane."""
        every, last = self._int(-1), self._int(31)
        bits = nvvm.shfl_sync(every, self.as_bits(x), self._int(lane), last, nvvm.ShflKind.idx)
        return self.as_float(bits)

    # Memory.

    def address(self, memory: Memory, *index: Reg) -> Address:
        """The address of the element, or of the row, with these first indices."""
        address: Address = _Address(0, 0)
        for i, stride in zip(index, memory.strides, strict=False):
            address = self.add(address, self.multiply(i, stride))
        return address

    def _split(self, address: Address) -> _Address:
        if isinstance(address, _Address):
            return address
        return _Address(0, address) if isinstance(address, int) else _Address(address, 0)

    def _pointer(self, memory: Memory, address: Address) -> Any:
        i8, address = ir.IntegerType.get_signless(8), self._split(address)
        # The empty move hides the sum from LLVM, which would turn it into an `or` and leave no
        # constant for the instruction.
        dynamic = self._asm(self.i32, "mov.b32 $0, $1;", "=r,r", self._int(address.dynamic))
        pointer = mgpu.utils.getelementptr(memory.pointer, [dynamic], i8)
        return mgpu.utils.getelementptr(pointer, [address.constant], i8)

    def load(self, memory: Memory, address: Address, n: int) -> list[Reg]:
        """n words, in loads of at most 16 bytes, each aligned to its size."""
        words: list[Reg] = []
        while n > 4:
            words += self.load(memory, address, 4)
            address, n = self.add(address, 16), n - 4
        pointer = self._pointer(memory, address)
        if n == 1:
            return [*words, llvm.load(self.i32, pointer)]
        loaded = llvm.load(ir.VectorType.get((n,), self.i32), pointer, alignment=4 * n)
        return words + [self._element(loaded, i) for i in range(n)]

    def load_half(self, memory: Memory, address: Address) -> Reg:
        """16 bits, in the low half of a register."""
        half = llvm.load(ir.IntegerType.get_signless(16), self._pointer(memory, address))
        return arith.extui(self.i32, half)

    def load_where(self, condition: Reg, memory: Memory, address: Address) -> Reg:
        """One word on lanes where the condition holds; 0 on the others, which read nothing."""
        branch = scf.IfOp(condition, [self.i32], has_else=True)
        loaded = [lambda: self.load(memory, address, 1), lambda: [self._int(0)]]
        for block, words in zip((branch.then_block, branch.else_block), loaded, strict=True):
            assert block is not None
            with ir.InsertionPoint(block):
                scf.yield_(words())
        return branch.results[0]

    def _element(self, x: Any, i: int) -> Reg:
        position = ir.DenseI64ArrayAttr.get([i])
        return vector.extract(x, dynamic_position=[], static_position=position)

    def store(self, memory: Memory, address: Address, words: Sequence[Reg]) -> None:
        """Words, in stores of at most 16 bytes, each aligned to its size."""
        while len(words) > 4:
            self.store(memory, address, words[:4])
            address, words = self.add(address, 16), words[4:]
        pointer = self._pointer(memory, address)
        if len(words) == 1:
            llvm.store(words[0], pointer)
            return
        x = vector.from_elements(ir.VectorType.get((len(words),), self.i32), list(words))
        llvm.store(x, pointer, alignment=4 * len(words))

    def copy_async(
        self, target: Memory, to: Address, source: Memory, at: Address, size: Reg
    ) -> None:
        """Starts to copy 16 bytes from device to shared memory, both aligned to as many, with zeros
        in place of those past the first `size`."""
        source_type = ir.Type.parse("!llvm.ptr<1>")
        nvvm.cp_async_shared_global(
            self._pointer(target, to),
            llvm.addrspacecast(source_type, self._pointer(source, at)),
            16,
            nvvm.LoadCacheModifierKind.CG,  # past the L1 cache: nothing is read twice
            cp_size=None if isinstance(size, int) and size == 16 else self._int(size),
        )

    def end_of_copies(self) -> None:
        """Makes a group of the copies that the lane has started since the last one."""
        nvvm.cp_async_commit_group()

    def wait_for_copies(self, newer: int) -> None:
        """Waits for the lane's groups of copies, all but so many of the latest; the other lanes
        see them after `synchronize`."""
        nvvm.cp_async_wait_group(newer)

    def synchronize(self) -> None:
        """Barrier of the warpgroup: afterwards a lane sees what the other warps wrote."""
        mgpu.utils.warpgroup_barrier()

    def synchronize_warp(self) -> None:
        """Barrier of the warp: what its lanes have read may be overwritten by others of them."""
        mgpu.utils.warp_barrier()

    # Control.

    def loop(self, n: int, carry: Any, body: Callable[[Reg, Any], Any]) -> Any:
        """The carry, a tree of registers, after n times `carry = body(i, carry)`."""
        flat, tree = jax.tree.flatten(carry)
        loop = scf.ForOp(self._int(0), self._int(n), self._int(1), flat)
        with ir.InsertionPoint(loop.body):
            carry = body(loop.induction_variable, jax.tree.unflatten(tree, loop.inner_iter_args))
            scf.yield_(jax.tree.leaves(carry))
        return jax.tree.unflatten(tree, list(loop.results))

    def when(self, condition: Reg, body: Callable[[], None]) -> None:
        """Runs the body on lanes where the condition holds."""
        with mgpu.when(condition):
            body()
