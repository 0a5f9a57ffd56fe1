"""The gradients of q and k of a group of steps: sums over columns, on the tensor cores.

    dq_t[n] = sum_v S_t[v, n] d_out_t[v]
    dk_t[n] = sum_v S_{t-1}[v, n] d_read_t[v] + d_sum_t[v, n] correction_t[v]

Four steps at once. The right-hand sides have 8 columns: d_out of the 4 steps, then d_read of them,
for the states; nothing, then the corrections, for d_sum. The product with S_t therefore holds dq_t
and half of dk_{t+1}, each in a column of its own; the other columns are not used.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels import tensor_cores as tc
from pallas_kernels.layouts import WARPS, inline

STEPS = 4


def column_sums(
    states: Any,
    d_sums: Any,
    d_out: Any,
    vectors: Any,
    d_keys: Any,
    swizzle: int,
    interpret: bool,
) -> None:
    """Writes dq and dk, `d_keys` `[2, steps, heads, N]` in bfloat16 or float32.

    All others are bfloat16, in shared memory, and may have more rows than there are steps.

    Args:
        states: `[> steps, heads, V, >= N]`: row t is the state before step t.
        d_sums: `[>= steps, heads, V, >= N]`.
        d_out: `[steps, heads, V]`.
        vectors: `[2, >= steps, heads, V]`: corrections, then d_read.
    """
    if interpret:
        _, steps, _, keys = d_keys.shape
        s, d_s = (x[...].astype(jnp.float32)[..., :keys] for x in (states, d_sums))
        d_o = d_out[...].astype(jnp.float32)
        correction, d_read = vectors[:, :steps].astype(jnp.float32)

        def contract(matrices: Any, vectors: Any) -> Any:
            return jnp.einsum("thvn,thv->thn", matrices[:steps], vectors)

        d_keys[0] = contract(s[1:], d_o).astype(d_keys.dtype)
        d_keys[1] = (contract(s, d_read) + contract(d_s, correction)).astype(d_keys.dtype)
        return
    refs = states, d_sums, d_out, vectors, d_keys
    types = (plgpu.RefType(),) * len(refs)
    inline(functools.partial(_emit, swizzle), *refs, arg_types=types)


def _emit(swizzle: int, _: Any, *refs: ir.Value) -> None:
    states, d_sums, d_out, vectors, d_keys = (tc.SharedMemory(ref) for ref in refs)
    _, steps, heads, keys = d_keys.type.shape
    key_tiles, step_tiles = -(-keys // 16), -(-steps // STEPS)
    warp, lane = tc.warp_and_lane()

    def tile(index: ir.Value) -> None:
        index, key_tile = tc.divide(index, key_tiles)
        head, step_tile = tc.divide(index, step_tiles)
        emit = functools.partial(_emit_tile, swizzle, lane, states, d_sums, d_out, vectors, d_keys)
        n0 = tc.multiply(key_tile, 16)
        whole_tiles, left_over = divmod(steps, STEPS)
        if left_over == 0:
            emit(head, tc.multiply(step_tile, STEPS), n0, STEPS)
            return
        with mgpu.when(tc.equal(step_tile, whole_tiles)):
            emit(head, tc.constant(whole_tiles * STEPS), n0, left_over)
        if whole_tiles:
            short = arith.cmpi(arith.CmpIPredicate.ult, step_tile, tc.constant(whole_tiles))
            with mgpu.when(short):
                emit(head, tc.multiply(step_tile, STEPS), n0, STEPS)

    loop = scf.ForOp(warp, tc.constant(heads * key_tiles * step_tiles), tc.constant(WARPS), [])
    with ir.InsertionPoint(loop.body):
        tile(loop.induction_variable)
        scf.yield_([])


def _emit_tile(
    swizzle: int,
    lane: ir.Value,
    states: tc.SharedMemory,
    d_sums: tc.SharedMemory,
    d_out: tc.SharedMemory,
    vectors: tc.SharedMemory,
    d_keys: tc.SharedMemory,
    head: ir.Value,
    t0: ir.Value,
    n0: ir.Value,
    steps: int,
) -> None:
    """Up to 4 steps from t0, 16 keys from n0."""
    i32 = tc.i32()
    _, n_steps, _, keys = d_keys.type.shape
    values = d_out.type.shape[-1]
    # Of operands and results of the products: this lane's rows and columns.
    group, quarter = tc.divide(lane, 4)
    pair = tc.multiply(quarter, 2)
    # Of the matrices that it gives an address for.
    matrix, row = tc.divide(lane, 8)
    upper, right = arith.divui(matrix, tc.constant(2)), arith.andi(matrix, tc.constant(1))
    v_row = tc.add(tc.multiply(upper, 8), row)
    # Past the end, any keys will do.
    n_row = arith.minui(tc.add(n0, tc.multiply(right, 8)), tc.constant(keys - 8))

    half, column = tc.divide(group, STEPS)
    t_column = arith.minui(tc.add(t0, column), tc.constant(n_steps - 1))
    is_upper_half = tc.equal(half, 1)
    d_out_at = d_out.address(t_column, head, pair)
    correction_at = vectors.address(0, t_column, head, pair)
    d_read_at = vectors.address(1, t_column, head, pair)
    of_states_at = arith.select(is_upper_half, d_read_at, d_out_at)

    def add_columns(v0: ir.Value | int, n_v: int, accs: list[Any]) -> list[Any]:
        """Adds columns v0 to v0 + 8 n_v."""
        offset = tc.multiply(v0, 2) if not isinstance(v0, int) else 2 * v0

        def load(at: ir.Value) -> list[Any]:
            return [
                llvm.load(i32, tc.pointer(tc.add(tc.add(at, offset), 16 * j))) for j in range(n_v)
            ]

        of_states = load(of_states_at)
        of_d_sums = [arith.select(is_upper_half, b, tc.constant(0)) for b in load(correction_at)]
        v = tc.add(v_row, v0)
        # Inside a matrix, as each is a multiple of what the swizzle repeats after.
        inside = tc.add(tc.multiply(v, states.strides[2]), tc.multiply(n_row, 2))
        bits = arith.andi(arith.shrui(inside, tc.constant(7)), tc.constant(swizzle // 16 - 1))
        inside = arith.xori(inside, arith.shli(bits, tc.constant(4)))
        state_at = tc.add(states.address(t0, head, 0, 0), inside)
        d_sum_at = tc.add(d_sums.address(t0, head, 0, 0), inside)
        accs = list(accs)
        for t in range(steps + 1):
            state = tc.load_transposed(tc.add(state_at, t * states.strides[0]), 2 * n_v)
            accs[t] = tc.multiply_add(accs[t], state, of_states)
        for t in range(steps):
            d_sum = tc.load_transposed(tc.add(d_sum_at, t * d_sums.strides[0]), 2 * n_v)
            accs[t] = tc.multiply_add(accs[t], d_sum, of_d_sums)
        return accs

    zero = arith.constant(ir.F32Type.get(), 0.0)
    accs: list[Any] = [[zero] * 4 for _ in range(steps + 1)]
    if values >= 16:
        loop = scf.ForOp(
            tc.constant(0),
            tc.constant(values // 16 * 16),
            tc.constant(16),
            list(itertools.chain.from_iterable(accs)),
        )

        def split(flat: Any) -> list[Any]:
            return [list(flat)[4 * i : 4 * i + 4] for i in range(steps + 1)]

        with ir.InsertionPoint(loop.body):
            sums = add_columns(loop.induction_variable, 2, split(loop.inner_iter_args))
            scf.yield_(list(itertools.chain.from_iterable(sums)))
        accs = split(loop.results)
    if values % 16:
        accs = add_columns(values // 16 * 16, 1, accs)

    # Quarters 0 and 1 hold dq of steps 0 and 1, and 2 and 3: column t of the product with S_t.
    # Quarters 2 and 3 hold dk likewise: column 4 + t of the product with the state before.
    is_quarter = [tc.equal(quarter, i) for i in range(3)]
    is_k, t_pair = tc.divide(quarter, 2)
    for odd in range(2):
        t = tc.add(tc.multiply(t_pair, 2), odd)
        of_quarter = [accs[min(i, steps)] for i in (1 + odd, 3 + odd, odd, 2 + odd)]
        for lower in range(2):  # the 8 keys after n0, then the 8 after those
            element = 2 * lower + odd
            x = of_quarter[3][element]
            for i in reversed(range(3)):
                x = arith.select(is_quarter[i], of_quarter[i][element], x)
            if d_keys.bytes == 2:
                x = arith.truncf(ir.BF16Type.get(), x)
            n = tc.add(n0, tc.add(group, 8 * lower))
            at = d_keys.address(is_k, tc.add(t0, t), head, n)
            inside = []
            if lower and keys % 16:
                inside.append(arith.cmpi(arith.CmpIPredicate.ult, n, tc.constant(keys)))
            if steps < STEPS:
                inside.append(arith.cmpi(arith.CmpIPredicate.ult, t, tc.constant(steps)))
            if inside:
                with mgpu.when(functools.reduce(arith.andi, inside)):
                    llvm.store(x, tc.pointer(at))
            else:
                llvm.store(x, tc.pointer(at))
