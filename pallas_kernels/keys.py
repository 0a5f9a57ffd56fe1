"""Products of the state with keys and queries, for one chunk.

Of a state S `[values, keys]` they are what crosses its columns' keys: the sum over keys of S k, and
S + d k^T. For float32 inputs they are multiply-adds in float32. For bfloat16 inputs the tensor
cores form them, with S as their left-hand side or their result: lanes hold it as they want it.

What is rounded there: the states that are read, to float16, which |S| <= 1 keeps within 2^-12;
gradients that are summed, to bfloat16; the vector d of S + d k^T, to two bfloat16, 16 bits.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import tensor_cores as tc
from pallas_kernels.layouts import (
    COLUMN_LANES,
    KEY_LANES,
    KEYS,
    STATE,
    VALUES,
    WARPS,
    Registers,
    keys_per_vector,
    tiled,
)

HALF_MAX = 65504.0
"""The largest float16."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """Rows `[steps, heads, N]` of keys and queries in shared memory, in the dtype of the inputs."""

    registers: Registers
    k: Any
    q: Any = None

    def outer_row(self, t: Any) -> Any:
        """What `add_outer` needs of step t."""
        k = self.registers.load(self.k.at[t], KEYS)
        return k, None if self.q is None else self.registers.load(self.q.at[t], KEYS)

    def add_outer(
        self, x: Array, row: Any, *, of_k: Array | None = None, of_q: Array | None = None
    ) -> Array:
        """STATE: x + of_k k^T + of_q q^T; of_k and of_q are of VALUES, of_q exact in bfloat16."""
        registers = self.registers
        for keys, values in zip(row, (of_k, of_q), strict=True):
            if values is not None:
                keys = registers.spread(registers.wide(keys, KEYS), KEYS)
                x = x + keys * registers.spread(values, VALUES)
        return x

    def read_row(self, k: Any, q: Any = None) -> Any:
        """What `read` needs to read at the keys of step k, and the queries of step q."""
        rows = [self.registers.load(self.k.at[k], KEYS)]
        if q is not None:
            rows.append(self.registers.load(self.q.at[q], KEYS))
        return tuple(rows)

    def read(self, state: Array, row: Any) -> tuple[Array, ...]:
        """VALUES: S^T k, and S^T q if `row` has queries."""
        return self.registers.sums_over_keys(
            state, *(self.registers.wide(x, KEYS) for x in row)
        )

    def read_exactly(self, state: Array, t: Any) -> Array:
        """VALUES: S^T k_t with S and the sum in float32, whatever the magnitude of S."""
        k = self.registers.wide(self.registers.load(self.k.at[t], KEYS), KEYS)
        return self.registers.sums_over_keys(state, k)[0]

    def sum_row(self, t: Any) -> Any:
        return self.registers.load(self.k.at[t], KEYS)

    def sum_gradient(self, d_sum: Array, narrow: Array, row: Any) -> Array:
        """VALUES: d_sum^T k. `narrow` is d_sum rounded to the dtype of the inputs."""
        del narrow
        return self.registers.sums_over_keys(d_sum, self.registers.wide(row, KEYS))[0]


def scratch(n: int, chunk: int, heads: int, keys: int) -> dict[str, Any]:
    """Shared memory of `TensorCoreKeys`, n of keys (and queries)."""
    return {
        "pairs": plgpu.SMEM((chunk, heads, keys, 2), jnp.bfloat16),
        "halves": plgpu.SMEM((n, chunk, heads, keys), jnp.float16),
    }


@dataclasses.dataclass(frozen=True)
class TensorCoreKeys(Keys):
    """For bfloat16. `prepare` must have filled `pairs` and `halves`.

    `pairs` `[steps, heads, N, 2]` interleaves q (or anything finite) with k; `halves`
    `[1 or 2, steps, heads, N]` is k, and q, in float16.
    """

    pairs: Any = None
    halves: Any = None

    def prepare(self) -> None:
        """Fills `pairs` and `halves` from k and q; the block's warps share the work."""
        even = self.k if self.q is None else self.q
        if self.registers.interpret:
            k, q = self.k[...], even[...]
            self.pairs[...] = jnp.stack([q, k], axis=-1)
            rows = [k, q][: self.halves.shape[0]]
            self.halves[...] = jnp.clip(
                jnp.stack(rows).astype(jnp.float32), -HALF_MAX, HALF_MAX
            ).astype(jnp.float16)
            return
        refs = self.k, even, self.pairs, self.halves
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)(_emit_prepare)(*refs)

    def outer_row(self, t: Any) -> Any:
        if self.registers.interpret:
            row = self.pairs[t]
            return row[..., 1], row[..., 0]
        return _load_pairs(self.registers, self.pairs.at[t])

    def add_outer(
        self, x: Array, row: Any, *, of_k: Array | None = None, of_q: Array | None = None
    ) -> Array:
        if self.registers.interpret:
            return super().add_outer(x, row, of_k=of_k, of_q=of_q)
        return _add_outer(self.registers, x, row, of_k, of_q)

    def read_row(self, k: Any, q: Any = None) -> Any:
        ref_k = self.halves.at[0, k]
        ref_q = None if q is None else self.halves.at[1, q]
        if self.registers.interpret:
            return (ref_k[...],) if ref_q is None else (ref_k[...], ref_q[...])
        if ref_q is None:
            return (self.registers.load(ref_k, KEYS),)
        return (_load_alternating(self.registers, ref_k, ref_q), None)

    def read(self, state: Array, row: Any) -> tuple[Array, ...]:
        if self.registers.interpret:
            return super().read(state, row)
        half = state.astype(jnp.float16)
        return _sum_on_tensor_cores(self.registers, half, row[0], len(row))

    def sum_gradient(self, d_sum: Array, narrow: Array, row: Any) -> Array:
        if self.registers.interpret:
            return super().sum_gradient(narrow.astype(jnp.float32), narrow, row)
        return _sum_on_tensor_cores(self.registers, narrow, row, 1)[0]


def _pair_layout(registers: Registers) -> Any:
    """Of `[heads, N]` of pairs: one lane in each group holds one of 8 neighbouring columns."""
    heads = registers.heads
    return tiled(
        ((heads, COLUMN_LANES), (1, 1)),
        (-4, plgpu.Replicated(WARPS // heads)) if heads > 1 else (plgpu.Replicated(WARPS),),
        (-3, plgpu.Replicated(KEY_LANES)),
        -1,
    )


def _tile_keys(registers: Registers, lane_group: ir.Value) -> list[ir.Value]:
    """For each 8 columns of a result: the key of this lane's column.

    Lane c holds keys `32 i + 8 c + e` (for vectors of 8) and its elements 2p and 2p + 1 are columns
    2c and 2c + 1 of result (i, p).
    """
    n_vector = keys_per_vector(registers.keys)
    holder, odd = tc.divide(lane_group, 2)
    base = tc.add(tc.multiply(holder, n_vector), odd)
    return [
        tc.add(base, KEY_LANES * n_vector * i + 2 * p)
        for i in range(registers.keys // (KEY_LANES * n_vector))
        for p in range(n_vector // 2)
    ]


def _own_head(registers: Registers) -> ir.Value:
    warp, _ = tc.warp_and_lane()
    return tc.divide(warp, WARPS // registers.heads)[0]


def _load_pairs(registers: Registers, ref: Any) -> Array:
    layout = _pair_layout(registers)
    shape = (registers.heads, registers.keys)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout),
    )
    def load(_: Any, ref: ir.Value) -> mgpu.FragmentedArray:
        memory = tc.SharedMemory(ref)
        _, lane = tc.warp_and_lane()
        group, _ = tc.divide(lane, KEY_LANES)
        head = _own_head(registers)
        values = [
            llvm.load(tc.i32(), tc.pointer(memory.address(head, key, 0)))
            for key in _tile_keys(registers, group)
        ]
        return _fragmented(values, layout, shape, signed=True)

    return load(ref)


def _load_alternating(registers: Registers, k: Any, q: Any) -> Array:
    """KEYS: k in the lanes of odd columns and q in those of even ones."""
    layout = registers.layout(KEYS)
    shape = (registers.heads, registers.keys)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * 2,
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float16, layout),
    )
    def load(_: Any, k: ir.Value, q: ir.Value) -> mgpu.FragmentedArray:
        n_vector = keys_per_vector(registers.keys)
        _, lane = tc.warp_and_lane()
        group, quarter = tc.divide(lane, KEY_LANES)
        odd = tc.equal(arith.remui(group, tc.constant(2)), 1)
        head, first = _own_head(registers), tc.multiply(quarter, n_vector)
        at_k, at_q = (tc.SharedMemory(x).address(head, first) for x in (k, q))
        at = arith.select(odd, at_k, at_q)
        kind = ir.VectorType.get((n_vector,), ir.F16Type.get())
        step = 2 * KEY_LANES * n_vector
        values = [
            llvm.load(kind, tc.pointer(tc.add(at, step * i)))
            for i in range(registers.keys // (KEY_LANES * n_vector))
        ]
        return _fragmented(values, layout, shape)

    return load(k, q)


def _fragmented(
    registers: list[Any], layout: Any, shape: tuple[int, ...], signed: bool | None = None
) -> mgpu.FragmentedArray:
    layout = layout.to_mgpu()
    array = np.empty(len(registers), dtype=object)
    kind = registers[0].type
    array[:] = [
        x if isinstance(kind, ir.VectorType) else vector.broadcast(ir.VectorType.get((1,), kind), x)
        for x in registers
    ]
    array = array.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def _words(register: ir.Value) -> list[ir.Value]:
    """The 32-bit words of a vector."""
    n = mgpu.bitwidth(register.type) // 32
    words = vector.bitcast(ir.VectorType.get((n,), tc.i32()), register)
    return elements(words)


def elements(register: ir.Value) -> list[ir.Value]:
    return [
        vector.extract(
            register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
        )
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def _by_column(registers: Registers, x: mgpu.FragmentedArray) -> list[list[Any]]:
    """Of a STATE or VALUES, this lane's registers: a list for each of its columns."""
    columns = registers.values // (COLUMN_LANES * WARPS // registers.heads)
    return [list(row) for row in x.registers.reshape(columns, -1)]


def _sum_on_tensor_cores(
    registers: Registers, x: Array, row: Array, n_results: int
) -> tuple[Array, ...]:
    """VALUES: the sums over keys of x, a STATE of 16 bits, times k, and q where `row` alternates."""
    dtype = "f16" if x.dtype == jnp.float16 else "bf16"
    values = registers.layout(VALUES)
    shape = (registers.heads, registers.values)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, values)

    @plgpu.inline_mgpu(
        arg_types=(registers.layout(STATE), registers.layout(KEYS)),
        return_type=(result,) * n_results,
    )
    def add(_: Any, x: mgpu.FragmentedArray, row: mgpu.FragmentedArray) -> Any:
        b = [word for register in row.registers.flat for word in _words(register)]
        a = [
            [word for register in column for word in _words(register)]
            for column in _by_column(registers, x)
        ]
        zero = tc.constant(0)
        f_zero = arith.constant(ir.F32Type.get(), 0.0)
        sums: list[list[Any]] = [[], []]
        for upper in range(0, len(a), 2):
            lower = a[upper + 1] if upper + 1 < len(a) else [zero] * len(b)
            # Two chains: a product waits for the one that it adds to.
            chains = [[f_zero] * 4, [f_zero] * 4]
            width = 2 if len(b) % 2 == 0 else 1
            for n, i in enumerate(range(0, len(b), width)):
                parts = [w for j in range(i, i + width) for w in (a[upper][j], lower[j])]
                chains[n % 2] = tc.multiply_add(chains[n % 2], parts, b[i : i + width], dtype)
            acc = chains[0]
            if len(b) > width:
                acc = [arith.addf(s, t) for s, t in zip(*chains, strict=True)]
            # Even columns are q if there is one, else k, as odd columns are.
            for parity in range(2):
                sums[parity] += [acc[parity]] + ([acc[2 + parity]] if upper + 1 < len(a) else [])
        wanted = [sums[1], sums[0]][:n_results]
        return tuple(_fragmented(s, values, shape) for s in wanted)

    return add(x, row)


def _add_outer(
    registers: Registers, x: Array, row: Array, of_k: Array | None, of_q: Array | None
) -> Array:
    state, values = registers.layout(STATE), registers.layout(VALUES)
    vectors = {name: x for name, x in (("k", of_k), ("q", of_q)) if x is not None}

    @plgpu.inline_mgpu(
        arg_types=(state, _pair_layout(registers), *(values for _ in vectors)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, state),
    )
    def add(
        _: Any,
        x: mgpu.FragmentedArray,
        row: mgpu.FragmentedArray,
        *arrays: mgpu.FragmentedArray,
    ) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        zero, f_zero = tc.constant(0), arith.constant(f32, 0.0)
        _, lane = tc.warp_and_lane()
        _, quarter = tc.divide(lane, KEY_LANES)
        is_first, is_second = tc.equal(quarter, 0), tc.equal(quarter, 1)
        pairs = [elements(register)[0] for register in row.registers.flat]
        columns = _by_column(registers, x)
        given = {
            name: [elements(register)[0] for register in v.registers.flat] + [f_zero]
            for name, v in zip(vectors, arrays, strict=True)
        }

        done: list[list[Any]] = []
        for upper in range(0, len(columns), 2):
            # Column 2c of the left-hand side goes with q and 2c + 1 with k, for c of 0 and 1.
            k_part = q_part = zero
            if "k" in given:
                both = given["k"][upper : upper + 2]
                high = tc.pack(*both, "bf16")
                rest = [
                    arith.subf(d, h) for d, h in zip(both, tc.unpack_bfloat16(high), strict=True)
                ]
                low = tc.pack(*rest, "bf16")
                k_part = arith.select(is_first, high, arith.select(is_second, low, zero))
            if "q" in given:
                q_part = tc.pack(*given["q"][upper : upper + 2], "bf16")
                q_part = arith.select(is_first, q_part, zero)
            a = [
                tc.permute_bytes(q_part, k_part, 0x5410),
                tc.permute_bytes(q_part, k_part, 0x7632),
            ]
            tile = [
                [e for register in columns[i] for e in elements(register)]
                for i in range(upper, min(upper + 2, len(columns)))
            ]
            new: list[list[Any]] = [[] for _ in tile]
            for p, b in enumerate(pairs):
                acc = [*tile[0][2 * p : 2 * p + 2]]
                acc += tile[1][2 * p : 2 * p + 2] if len(tile) > 1 else [f_zero] * 2
                acc = tc.multiply_add(acc, a, [b])
                for i, column in enumerate(new):
                    column += acc[2 * i : 2 * i + 2]
            done += new
        n_vector = keys_per_vector(registers.keys)
        kind = ir.VectorType.get((n_vector,), f32)
        result = [
            vector.from_elements(kind, column[i : i + n_vector])
            for column in done
            for i in range(0, len(column), n_vector)
        ]
        return _fragmented(result, state, registers.shape)

    return add(x, row, *vectors.values())


def _emit_prepare(_: Any, k: ir.Value, q: ir.Value, pairs: ir.Value, halves: ir.Value) -> None:
    """Each thread takes 8 neighbouring keys at a time."""
    bf16x8 = ir.VectorType.get((8,), ir.BF16Type.get())
    i32x4 = ir.VectorType.get((4,), tc.i32())
    f32 = ir.F32Type.get()
    k, q, pairs, halves = (tc.SharedMemory(x) for x in (k, q, pairs, halves))
    n_halves = halves.type.shape[0]
    total = int(np.prod(k.type.shape))
    thread = arith.remui(mgpu.thread_idx(), tc.constant(32 * WARPS))
    per_pass = 32 * WARPS * 8

    def to_half(words: list[ir.Value]) -> ir.Value:
        limit = arith.constant(f32, HALF_MAX)

        def clip(x: ir.Value) -> ir.Value:
            x = arith.minimumf(arith.maximumf(x, arith.negf(limit)), limit)
            return x

        halves = [tc.pack(*(clip(x) for x in tc.unpack_bfloat16(w)), "f16") for w in words]
        return vector.from_elements(i32x4, halves)

    for start in range(0, total, per_pass):
        first = tc.add(tc.multiply(thread, 8), start)

        def one(first: ir.Value = first) -> None:
            offset = tc.multiply(first, 2)
            words = {}
            for name, memory in (("k", k), ("q", q)):
                at = tc.pointer(tc.add(memory.base, offset))
                words[name] = _words(llvm.load(bf16x8, at))
            both = [
                tc.permute_bytes(a, b, selector)
                for a, b in zip(words["q"], words["k"], strict=True)
                for selector in (0x5410, 0x7632)
            ]
            at = tc.add(pairs.base, tc.multiply(first, 4))
            for i in range(2):
                llvm.store(
                    vector.from_elements(i32x4, both[4 * i : 4 * i + 4]),
                    tc.pointer(tc.add(at, 16 * i)),
                )
            for i, name in enumerate(("k", "q")[:n_halves]):
                at = tc.add(halves.address(i, 0, 0, 0), offset)
                llvm.store(to_half(words[name]), tc.pointer(at))

        if start + per_pass <= total:
            one()
        else:
            inside = arith.cmpi(arith.CmpIPredicate.ult, first, tc.constant(total))
            with mgpu.when(inside):
                one()
