"""Programs for the threads of a warpgroup: the instructions that they are written in, as MLIR.

Values are scalars of a lane, 32 bits wide: integers, or float32. A program takes the object that
makes its instructions, so that `tests/pallas_kernels/warp_in_numpy.py` can run it without a GPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, scf, vector

from pallas_kernels.layouts import THREADS


class Memory:
    """A reference to shared or device memory; addresses into it are in bytes."""

    def __init__(self, ref: ir.Value) -> None:
        self.type = ir.MemRefType(ref.type)
        self.shape = self.type.shape
        self.itemsize = mgpu.bitwidth(self.type.element_type) // 8
        strides, _ = self.type.get_strides_and_offset()
        self.strides = [stride * self.itemsize for stride in strides]
        self.pointer = mgpu.utils.memref_ptr(ref)


@dataclasses.dataclass(frozen=True)
class _Address:
    """In two summands, of which the second goes into the instruction that uses it."""

    dynamic: Any
    constant: int


class Warp:
    """The instructions of the lanes of a warp."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        self.f32 = ir.F32Type.get()
        self.warpgroup, self.thread = self.divide(mgpu.thread_idx(), THREADS)
        self.warp, self.lane = self.divide(self.thread, 32)  # of the warpgroup

    def _int(self, x: Any) -> Any:
        return arith.constant(self.i32, x) if isinstance(x, int) else x

    def _u(self, operation: Any, x: Any, y: Any) -> Any:
        return operation(self._int(x), self._int(y))

    def _asm(self, types: Any, instruction: str, kinds: str, *args: Any) -> Any:
        return llvm.inline_asm(types, list(args), instruction, kinds, has_side_effects=False)

    # Integers. Of two that are both Python's the result is Python's too.

    def add(self, x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return x + y
        if isinstance(x, _Address) or isinstance(y, _Address):
            x, y = self._split(x), self._split(y)
            return _Address(self.add(x.dynamic, y.dynamic), x.constant + y.constant)
        if isinstance(y, int) and y == 0:
            return x
        return self._u(arith.addi, x, y)

    def multiply(self, x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return x * y
        return self._u(arith.muli, x, y)

    def divide(self, x: Any, y: int) -> tuple[Any, Any]:
        if isinstance(x, int):
            return divmod(x, y)
        return self._u(arith.divui, x, y), self._u(arith.remui, x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        return self._u(arith.minui, x, y)

    def bits_and(self, x: Any, y: Any) -> Any:
        return self._u(arith.andi, x, y)

    def bits_xor(self, x: Any, y: Any) -> Any:
        return self._u(arith.xori, x, y)

    def shift_left(self, x: Any, n: int) -> Any:
        return self._u(arith.shli, x, n)

    def equal(self, x: Any, y: Any) -> Any:
        return arith.cmpi(arith.CmpIPredicate.eq, self._int(x), self._int(y))

    def less(self, x: Any, y: Any) -> Any:
        return arith.cmpi(arith.CmpIPredicate.ult, self._int(x), self._int(y))

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        return arith.select(condition, self._int(x), self._int(y))

    def bytes_of(self, low: Any, high: Any, selector: Any) -> Any:
        """The bytes, of the 8 of `high` and `low`, that the 4 hexadecimal digits name."""
        asm = "prmt.b32 $0, $1, $2, $3;"
        args = self._int(low), self._int(high), self._int(selector)
        return self._asm(self.i32, asm, "=r,r,r,r", *args)

    # Floating point.

    def number(self, x: float) -> Any:
        return arith.constant(self.f32, x)

    def as_float(self, bits: Any) -> Any:
        return arith.bitcast(self.f32, bits)

    def as_bits(self, x: Any) -> Any:
        return arith.bitcast(self.i32, x)

    def fadd(self, x: Any, y: Any) -> Any:
        return arith.addf(x, y)

    def fmultiply(self, x: Any, y: Any) -> Any:
        return arith.mulf(x, y)

    def negative(self, x: Any) -> Any:
        return arith.negf(x)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return math.fma(x, y, z)

    def tanh(self, x: Any, approximate: bool) -> Any:
        if approximate:
            return self._asm(self.f32, "tanh.approx.f32 $0, $1;", "=f,f", x)
        return math.tanh(x)

    def maximum(self, x: Any, y: Any) -> Any:
        return arith.maximumf(x, y)

    def exp2(self, x: Any) -> Any:
        """2 to the power of x, within 2 units in the last place."""
        return self._asm(self.f32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", x)

    def reciprocal(self, x: Any) -> Any:
        return self._asm(self.f32, "rcp.approx.ftz.f32 $0, $1;", "=f,f", x)

    def rsqrt(self, x: Any) -> Any:
        """1 over the square root of x, within 2^-22 of it."""
        return self._asm(self.f32, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", x)

    def pack(self, low: Any, high: Any) -> Any:
        """Two float32 numbers rounded to bfloat16."""
        return self._asm(self.i32, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", high, low)

    def multiply_add(self, acc: Sequence[Any], a: Sequence[Any], b: Any) -> list[Any]:
        """acc + a @ b: `[16, 8] + [16, 8] @ [8, 8]` of a warp, a and b in bfloat16.

        Lane 4 g + c holds of acc: `[g, 2c], [g, 2c + 1], [g + 8, 2c], [g + 8, 2c + 1]`; of a, in
        pairs: `[g, 2c], [g + 8, 2c]`; of b, in a pair along its rows: `[2c, g]`.
        Source: PTX ISA, matrix fragments for mma.m16n8k8.
        """
        return self._multiply_add("m16n8k8.row.col.f32.bf16.bf16.f32", acc, a, b)

    def multiply_add_tf32(self, acc: Sequence[Any], a: Sequence[Any], b: Any) -> list[Any]:
        """acc + a @ b: `[16, 8] + [16, 4] @ [4, 8]`, a and b in float32 cut off to tf32.

        Lane 4 g + c holds of a: `[g, c], [g + 8, c]`; of b: `[c, g]`.
        Source: PTX ISA, matrix fragments for mma.m16n8k4.
        """
        bits = [self.as_bits(x) for x in a]
        return self._multiply_add("m16n8k4.row.col.f32.tf32.tf32.f32", acc, bits, self.as_bits(b))

    def _multiply_add(self, kind: str, acc: Sequence[Any], a: Sequence[Any], b: Any) -> list[Any]:
        results = self._asm(
            llvm.StructType.get_literal([self.f32] * 4),
            f"mma.sync.aligned.{kind} {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, {{$7, $8, $9, $10}};",
            ",".join(["=f"] * 4 + ["r"] * 3 + ["f"] * 4),
            *(*a, b, *acc),
        )
        return [llvm.extractvalue(self.f32, results, [i]) for i in range(4)]

    def exchange(self, x: Any, distance: int) -> Any:
        """What the lane whose number differs in this bit gives."""
        return mgpu.utils.shfl_bfly(x, distance)

    def from_lane(self, x: Any, lane: int) -> Any:
        """What this lane gives."""
        every, last = self._int(-1), self._int(31)
        bits = nvvm.shfl_sync(every, self.as_bits(x), self._int(lane), last, nvvm.ShflKind.idx)
        return self.as_float(bits)

    # Memory.

    def address(self, memory: Memory, *index: Any) -> Any:
        """In bytes from the start of `memory`, of an element given by its first indices."""
        address: Any = _Address(0, 0)
        for i, stride in zip(index, memory.strides, strict=False):
            address = self.add(address, self.multiply(i, stride))
        return address

    def _split(self, address: Any) -> _Address:
        if isinstance(address, _Address):
            return address
        return _Address(0, address) if isinstance(address, int) else _Address(address, 0)

    def _pointer(self, memory: Memory, address: Any) -> Any:
        i8, address = ir.IntegerType.get_signless(8), self._split(address)
        # LLVM sees that an `or` adds the two, and leaves no constant for the instruction.
        dynamic = self._asm(self.i32, "mov.b32 $0, $1;", "=r,r", self._int(address.dynamic))
        pointer = mgpu.utils.getelementptr(memory.pointer, [dynamic], i8)
        return mgpu.utils.getelementptr(pointer, [address.constant], i8)

    def load(self, memory: Memory, address: Any, n: int) -> list[Any]:
        """n words, aligned to as many bytes, at most 16."""
        words: list[Any] = []
        while n > 4:
            words += self.load(memory, address, 4)
            address, n = self.add(address, 16), n - 4
        pointer = self._pointer(memory, address)
        if n == 1:
            return [*words, llvm.load(self.i32, pointer)]
        loaded = llvm.load(ir.VectorType.get((n,), self.i32), pointer, alignment=4 * n)
        return words + [self._element(loaded, i) for i in range(n)]

    def load_half(self, memory: Memory, address: Any) -> Any:
        """16 bits, in the low half of a word."""
        half = llvm.load(ir.IntegerType.get_signless(16), self._pointer(memory, address))
        return arith.extui(self.i32, half)

    def load_where(self, condition: Any, memory: Memory, address: Any) -> Any:
        """A word, or 0 on lanes where the condition does not hold, whose address is not read."""
        branch = scf.IfOp(condition, [self.i32], has_else=True)
        loaded = [lambda: self.load(memory, address, 1), lambda: [self._int(0)]]
        for block, words in zip((branch.then_block, branch.else_block), loaded, strict=True):
            assert block is not None
            with ir.InsertionPoint(block):
                scf.yield_(words())
        return branch.results[0]

    def _element(self, x: Any, i: int) -> Any:
        position = ir.DenseI64ArrayAttr.get([i])
        return vector.extract(x, dynamic_position=[], static_position=position)

    def store(self, memory: Memory, address: Any, words: Sequence[Any]) -> None:
        """Words, aligned to as many bytes, at most 16."""
        while len(words) > 4:
            self.store(memory, address, words[:4])
            address, words = self.add(address, 16), words[4:]
        pointer = self._pointer(memory, address)
        if len(words) == 1:
            llvm.store(words[0], pointer)
            return
        x = vector.from_elements(ir.VectorType.get((len(words),), self.i32), list(words))
        llvm.store(x, pointer, alignment=4 * len(words))

    def synchronize(self) -> None:
        """Waits for the other warps, and sees what they wrote."""
        mgpu.utils.warpgroup_barrier()

    # Control.

    def loop(self, n: int, carry: Any, body: Callable[[Any, Any], Any]) -> Any:
        """carry, n times through `body(i, carry)`."""
        flat, tree = jax.tree.flatten(carry)
        loop = scf.ForOp(self._int(0), self._int(n), self._int(1), flat)
        with ir.InsertionPoint(loop.body):
            carry = body(loop.induction_variable, jax.tree.unflatten(tree, loop.inner_iter_args))
            scf.yield_(jax.tree.leaves(carry))
        return jax.tree.unflatten(tree, list(loop.results))

    def when(self, condition: Any, body: Callable[[], None]) -> None:
        with mgpu.when(condition):
            body()
