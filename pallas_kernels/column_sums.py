"""The gradients of q and k of a chunk: sums over columns, on the tensor cores.

For each step of the chunk

    dq_t[n] = sum_v S_t[v, n] d_out_t[v]
    dk_t[n] = sum_v d_sum_t[v, n] correction_t[v] + S_{t-1}[v, n] d_read_t[v]

with all of them bfloat16 in shared memory. 8 steps make one product: column t of the 8 columns of
the right-hand side is the vector of step t while the matrix of step t is on the left, and zero
elsewhere, so that column t of the result is the sum of step t.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.layouts import WARPS

STEPS = 8
"""Steps of one product: the columns of the tensor cores' smallest right-hand side."""


def column_sums(
    states: Any,
    d_sums: Any,
    d_out: Any,
    corrections: Any,
    d_reads: Any,
    dq: Any,
    dk: Any,
    first: int,
    interpret: bool,
) -> None:
    """Writes dq and dk `[steps, heads, N]` (bfloat16 or float32) of steps `first` and later of a
    chunk, from row 0 on.

    Args:
        states: `[steps + 1, heads, V, >= N]`: row t is the state before step t.
        d_sums: `[steps, heads, V, >= N]`.
        d_out, corrections, d_reads: `[steps, heads, V]`.
    """
    if interpret:
        keys = dq.shape[-1]
        s, d_s = (x[...].astype(jnp.float32)[..., :keys] for x in (states, d_sums))

        def contract(matrices: Any, vectors: Any) -> Any:
            return jnp.einsum("thvn,thv->thn", matrices, vectors[...].astype(jnp.float32))

        def put(target: Any, x: Any) -> None:
            target[: x.shape[0] - first] = x[first:].astype(target.dtype)

        put(dq, contract(s[1:], d_out))
        put(dk, contract(d_s, corrections) + contract(s[:-1], d_reads))
        return
    refs = states, d_sums, d_out, corrections, d_reads, dq, dk
    emit = functools.partial(_emit, first)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(emit)(*refs)


def _i32(x: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, _i32(y) if isinstance(y, int) else y)


def _mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, _i32(y))


class _Smem:
    """Byte addresses into a reference in shared memory."""

    def __init__(self, ref: ir.Value) -> None:
        self.type = ir.MemRefType(ref.type)
        self.bytes = mgpu.bitwidth(self.type.element_type) // 8
        strides, _ = self.type.get_strides_and_offset()
        self.strides = [stride * self.bytes for stride in strides]
        pointer = mgpu.utils.memref_ptr(ref)
        self.base = llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)

    def address(self, *index: ir.Value | int) -> ir.Value:
        address, constant = self.base, 0
        for i, stride in zip(index, self.strides, strict=True):
            if isinstance(i, int):
                constant += i * stride
            else:
                address = arith.addi(address, _mul(i, stride))
        return _add(address, constant) if constant else address

    def pointer(self, address: ir.Value) -> ir.Value:
        return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)


def _asm(result_types: list[ir.Type], operands: list[ir.Value], code: str, constraints: str) -> Any:
    pure = dict(has_side_effects=False)
    if len(result_types) == 1:
        return [llvm.inline_asm(result_types[0], operands, code, constraints, **pure)]
    struct = llvm.StructType.get_literal(result_types)
    results = llvm.inline_asm(struct, operands, code, constraints, **pure)
    return [llvm.extractvalue(t, results, [i]) for i, t in enumerate(result_types)]


def _load_transposed(address: ir.Value, n: int) -> list[ir.Value]:
    """n 8x8 matrices of bfloat16, transposed; each 8 lanes give the addresses of 8 rows."""
    i32 = ir.IntegerType.get_signless(32)
    registers = ", ".join(f"${i}" for i in range(n))
    struct = llvm.StructType.get_literal([i32] * n)
    # The memory is written by other lanes between two loads, so this must stay where it is.
    results = llvm.inline_asm(
        struct,
        [address],
        f"ldmatrix.sync.aligned.m8n8.x{n}.trans.shared.b16 {{{registers}}}, [${n}];",
        ",".join(["=r"] * n) + ",r,~{memory}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, results, [i]) for i in range(n)]


def _multiply_add(acc: list[ir.Value], a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    """acc + a @ b on the tensor cores: `[16, 8] + [16, 8 len(b)] @ [8 len(b), 8]`, one warp."""
    n_a, n_b = len(a), len(b)
    counter = itertools.count()
    d, a_list, b_list, c = (
        "{" + ", ".join(f"${next(counter)}" for _ in range(n)) + "}" for n in (4, n_a, n_b, 4)
    )
    return _asm(
        [ir.F32Type.get()] * 4,
        [*a, *b, *acc],
        f"mma.sync.aligned.m16n8k{8 * n_b}.row.col.f32.bf16.bf16.f32 {d}, {a_list}, {b_list}, {c};",
        ",".join(["=f"] * 4 + ["r"] * (n_a + n_b) + ["f"] * 4),
    )


def _emit(first: int, _: Any, *refs: ir.Value) -> None:
    i32 = ir.IntegerType.get_signless(32)
    states, d_sums, d_out, corrections, d_reads, dq, dk = (_Smem(ref) for ref in refs)
    n_steps, heads, keys = dq.type.shape
    values = d_out.type.shape[-1]
    thread = arith.remui(mgpu.thread_idx(), _i32(32 * WARPS))
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    group, pair = arith.divui(lane, _i32(4)), _mul(arith.remui(lane, _i32(4)), 2)
    matrix, row = arith.divui(lane, _i32(8)), arith.remui(lane, _i32(8))

    key_tiles = -(-keys // 16)
    step_tiles = n_steps // STEPS
    n_tiles = heads * key_tiles * step_tiles

    def tile(index: ir.Value) -> None:
        head = arith.divui(index, _i32(key_tiles * step_tiles))
        index = arith.remui(index, _i32(key_tiles * step_tiles))
        t0 = _mul(arith.divui(index, _i32(key_tiles)), STEPS)
        n0 = _mul(arith.remui(index, _i32(key_tiles)), 16)
        # Matrices 1 and 3 of a load are the upper 8 keys; past the end, any keys will do.
        upper = arith.andi(matrix, _i32(1))
        n_row = _add(n0, _mul(upper, 8))
        n_row = arith.minui(n_row, _i32(keys - 8))
        v_row = _add(_mul(arith.divui(matrix, _i32(2)), 8), row)

        def products(v0: ir.Value | int, n_v: int, accs: list[Any]) -> list[Any]:
            """Adds columns v0 to v0 + 8 n_v."""
            q_acc, k_acc, k2_acc = accs
            v = _add(v_row, v0)

            def vectors(ref: _Smem) -> list[ir.Value]:
                at = ref.address(_add(t0, group), head, _add(pair, v0))
                return [
                    llvm.load(i32, ref.pointer(_add(at, 16 * j) if j else at)) for j in range(n_v)
                ]

            b_out, b_correction, b_read = (vectors(ref) for ref in (d_out, corrections, d_reads))
            state_at = states.address(t0, head, v, n_row)
            d_sum_at = d_sums.address(t0, head, v, n_row)
            before = _load_transposed(state_at, 2 * n_v)
            for t in range(STEPS):
                mine = arith.cmpi(arith.CmpIPredicate.eq, group, _i32(t))

                def only(b: list[ir.Value], mine: ir.Value = mine) -> list[ir.Value]:
                    return [arith.select(mine, x, _i32(0)) for x in b]

                after = _load_transposed(_add(state_at, (t + 1) * states.strides[0]), 2 * n_v)
                d_sum = _load_transposed(_add(d_sum_at, t * d_sums.strides[0]), 2 * n_v)
                q_acc = _multiply_add(q_acc, after, only(b_out))
                k_acc = _multiply_add(k_acc, d_sum, only(b_correction))
                k2_acc = _multiply_add(k2_acc, before, only(b_read))
                before = after
            return [q_acc, k_acc, k2_acc]

        zero = arith.constant(ir.F32Type.get(), 0.0)
        accs: list[Any] = [[zero] * 4 for _ in range(3)]
        if values >= 16:
            flat = [x for acc in accs for x in acc]
            loop = scf.ForOp(_i32(0), _i32(values // 16 * 16), _i32(16), flat)
            with ir.InsertionPoint(loop.body):
                inner = list(loop.inner_iter_args)
                sums = products(loop.induction_variable, 2, [inner[i : i + 4] for i in (0, 4, 8)])
                scf.yield_([x for acc in sums for x in acc])
            accs = [list(loop.results)[i : i + 4] for i in (0, 4, 8)]
        if values % 16:
            accs = products(values // 16 * 16, 1, accs)
        q_acc, k_acc, k2_acc = accs
        k_acc = [arith.addf(x, y) for x, y in zip(k_acc, k2_acc, strict=True)]
        for ref, acc in ((dq, q_acc), (dk, k_acc)):
            for i, x in enumerate(acc):  # rows `group` and 8 later, columns `pair` and 1 later
                n = _add(n0, _add(group, 8 * (i // 2)))
                t = _add(t0, _add(pair, i % 2))
                at = ref.address(_add(t, -first), head, n)
                if ref.bytes == 2:
                    x = arith.truncf(ir.BF16Type.get(), x)
                inside = None
                if first:
                    inside = arith.cmpi(arith.CmpIPredicate.uge, t, _i32(first))
                if i // 2 and keys % 16:
                    short = arith.cmpi(arith.CmpIPredicate.ult, n, _i32(keys))
                    inside = short if inside is None else arith.andi(inside, short)
                if inside is None:
                    llvm.store(x, ref.pointer(at))
                else:
                    with mgpu.when(inside):
                        llvm.store(x, ref.pointer(at))

    loop = scf.ForOp(warp, _i32(n_tiles), _i32(WARPS), [])
    with ir.InsertionPoint(loop.body):
        tile(loop.induction_variable)
        scf.yield_([])
