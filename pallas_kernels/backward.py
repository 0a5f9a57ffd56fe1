"""The backward kernel: each block replays its columns and carries their gradient back in time.

Segments, of the steps between two checkpoints, go by from last to first. In each, the steps are
first replayed in order, to leave the state before each group of a few steps in device memory (a
few states per head, whatever T is). Then, from last to first, a group is replayed again with every
state kept in shared memory, and its gradient is taken step by step. What is not on the critical
path from one step to the one before it, the sums that make the gradients of q and k, is done once
for each group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cell
from pallas_kernels.blocks import (
    SLOTS,
    Block,
    Chunks,
    Input,
    Stream,
    run_blocks,
    scalars_at_once,
    start_stores,
    synchronize,
    wait_for_stores,
)
from pallas_kernels.column_sums import column_sums
from pallas_kernels.geometry import Geometry
from pallas_kernels.layouts import HEADS, KEYS, STATE, VALUES
from pallas_kernels.operands import Operands, load_step


class Gradients(NamedTuple):
    """P blocks of columns give a part each of what is a sum over columns."""

    d_q: Array  # [P, B, T, H, N]
    d_k: Array  # [P, B, T, H, N]
    d_v: Array  # [B, T, H, V]
    d_scalars: Array  # [P, B, H, S, T] float32: of decay, then of the write gate if there is one
    d_initial_state: Array  # [B, H, V, N] float32


def part_dtype(geometry: Geometry, n_values: int, dtype: Any) -> Any:
    """Of the gradients of q and k: float32 where blocks of columns each give a part of a sum."""
    return dtype if n_values <= geometry.values else jnp.float32


def reduction_bytes(dtype: Any) -> int:
    """Shared memory for sums over the columns of several warps, in registers."""
    return 0 if dtype == jnp.bfloat16 else 8192


def scratch(
    geometry: Geometry, keys: int, n_scalars: int, has_write_gate: bool, dtype: Any, part: Any
) -> dict[str, Any]:
    """The shared memory of a warpgroup, by name."""
    heads, values, chunk = geometry.heads, geometry.values, geometry.chunk
    history = geometry.history
    lanes = geometry.registers(keys, dtype, False).lane_sums_shape[1]
    matrix = (heads, values, _history_row(keys, dtype)[0])
    memory = {
        "k_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "v_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, scalars_at_once(chunk)), jnp.float32),
        "q_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "d_out_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "states": plgpu.SMEM((history + 1, *matrix), dtype),
        # The correction, and the gradient of what was read.
        "vectors": plgpu.SMEM((2, history, heads, values), dtype),
        "d_keys_rows": plgpu.SMEM((2, chunk, heads, keys), part),  # of q and of k
        "d_v_rows": plgpu.SMEM((chunk, heads, values), dtype),
        "lane_sums": plgpu.SMEM((1 + has_write_gate, history, heads, lanes), jnp.float32),
        "replay_loaded": plgpu.Barrier(num_arrivals=3),
        "return_loaded": plgpu.Barrier(num_arrivals=2),
    }
    if dtype == jnp.bfloat16:
        memory["d_sums"] = plgpu.SMEM((history, *matrix), dtype)
    if has_write_gate:
        memory["errors"] = plgpu.SMEM((history, heads, values), jnp.float32)
    return memory


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    checkpoints: Array,
    geometry: Geometry,
    checkpoint_every: int,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    """The gradients of `forward`, from its checkpoints; one is every so many steps."""
    batch, _, n_heads, keys = x.q.shape
    n_values = x.v.shape[-1]
    dtype = x.v.dtype
    heads, values, size = geometry.heads, geometry.values, geometry.chunk
    value_blocks = n_values // values
    n_blocks = batch * (n_heads // heads) * value_blocks
    chunks = Chunks(x.time, size)
    segment_chunks = checkpoint_every // size
    registers = geometry.registers(keys, dtype, interpret is not None)
    n_scalars = x.scalars.shape[2]
    n_d_scalars = 1 + x.has_write_gate
    on_tensor_cores = dtype == jnp.bfloat16
    part = part_dtype(geometry, n_values, dtype)
    if geometry.warpgroups > 1 and not on_tensor_cores:
        # Sums over several warps take shared memory that is for one warpgroup.
        raise ValueError(
            f"the backward kernel takes 1 warpgroup in {jnp.dtype(dtype).name}, "
            f"got {geometry.warpgroups}."
        )
    history = geometry.history
    groups_per_chunk = size // history

    inputs = {
        "q": x.q,
        "k": x.k,
        "v": x.v,
        "scalars": x.scalars,
        "d_out": d_out,
        "d_final_state": d_final_state,
        "checkpoints": checkpoints,
    }
    d_keys = jax.ShapeDtypeStruct((value_blocks, batch, x.time, n_heads, keys), part)
    outputs = {
        "d_q": d_keys,
        "d_k": d_keys,
        "d_v": jax.ShapeDtypeStruct((batch, x.time, n_heads, n_values), dtype),
        "d_scalars": jax.ShapeDtypeStruct(
            (value_blocks, batch, n_heads // heads, chunks.count, n_d_scalars, size, heads),
            jnp.float32,
        ),
        "d_initial_state": jax.ShapeDtypeStruct((batch, n_heads, n_values, keys), jnp.float32),
        # The state before each group of a segment: not a result.
        "replayed": jax.ShapeDtypeStruct(
            (n_blocks, segment_chunks * groups_per_chunk, heads, values, keys), dtype
        ),
    }
    swizzle = _history_row(keys, dtype)[1]

    def body(index: Any, barriers: Any, ref: dict[str, Any]) -> None:
        block = Block.from_index(index, n_heads, n_values, heads, values)
        replay_stream = Stream(
            block,
            chunks,
            [
                Input(ref["k"], ref["k_slots"], KEYS),
                Input(ref["v"], ref["v_slots"], VALUES),
                Input(ref["scalars"], ref["scalars_slots"], HEADS),
            ],
            ref["replay_loaded"],
            barriers,
        )
        return_stream = Stream(
            block,
            chunks,
            [
                Input(ref["q"], ref["q_slots"], KEYS),
                Input(ref["d_out"], ref["d_out_slots"], VALUES),
            ],
            ref["return_loaded"],
            barriers,
        )

        def matrix_at(name: str, i: Any) -> Any:
            return ref[name].at[i, :, :, pl.ds(0, keys)]

        def store_matrix(name: str, i: Any, matrix: Array) -> None:
            registers.store(matrix_at(name, i), matrix, STATE, swizzle)

        def load_state(i: Any) -> Array:
            return registers.load(matrix_at("states", i), STATE, swizzle)

        def kept(group: Any) -> Any:
            """The state before a group of the segment."""
            return ref["replayed"].at[index, group]

        def loader(slot: Any, rows: range) -> Any:
            k, v, scalars = (ref[name].at[slot] for name in ("k_slots", "v_slots", "scalars_slots"))
            return lambda t: load_step(registers, x, k, v, scalars, t, rows.start)

        # What a step reads is loaded a step ahead: a warp issues in order, and would wait for it.

        def replay(slot: Any, rows: range, t0: Any, n: int, state: Array, keep: bool) -> Array:
            """Steps t0 to t0 + n of a chunk, with their states and corrections kept or not."""
            load = loader(slot, rows)

            def step(i: Any, carry: Any) -> Any:
                state, read, inputs = carry
                next_inputs = load(t0 + jnp.minimum(i + 1, n - 1))
                update = cell.update(registers, state, read, inputs, linear_state)
                (read,) = cell.read(registers, update.state, next_inputs.k)
                if keep:
                    store_matrix("states", i + 1, update.state)
                    registers.store(ref["vectors"].at[0, i], update.correction, VALUES)
                    if x.has_write_gate:
                        registers.store(ref["errors"].at[i], update.error, VALUES)
                return update.state, read, next_inputs

            inputs = load(t0)
            (read,) = cell.read(registers, state, inputs.k)
            carry = state, read, inputs
            return lax.fori_loop(0, n, step, carry, unroll=geometry.unroll_of(n))[0]

        def return_over(
            slots: Any, i: Any, rows: range, t0: Any, n: int, state: Array, d_state: Array
        ) -> Array:
            """The gradient of steps t0 to t0 + n of chunk i, from the state before them."""
            slot, return_slot = slots
            load_inputs = loader(slot, rows)

            def load(j: Any) -> Any:
                t = t0 + j
                return (
                    load_inputs(t),
                    registers.load(ref["q_slots"].at[return_slot, t], KEYS),
                    registers.load(ref["d_out_slots"].at[return_slot, t], VALUES),
                    load_state(j),
                )

            def step(back: Any, carry: Any) -> Any:
                after, d_state, (inputs, q, d_o, before) = carry
                j = n - 1 - back
                next_loaded = load(jnp.maximum(j - 1, 0))
                before = registers.wide(before, STATE)
                d = cell.step_back(registers, after, d_state, q, d_o, inputs, linear_state)
                row = t0 + (j - rows.start)
                registers.store(ref["d_v_rows"].at[row], d.d_v, VALUES)
                sums = registers.lane_sums(d.d_sum, before, STATE)
                registers.store_lane_sums(ref["lane_sums"].at[0, j], sums)
                if x.has_write_gate:
                    error = registers.load(ref["errors"].at[j], VALUES)
                    sums = registers.lane_sums(d.d_correction, error, VALUES)
                    registers.store_lane_sums(ref["lane_sums"].at[1, j], sums)
                if on_tensor_cores:
                    store_matrix("d_sums", j, d.d_sum)
                    registers.store(ref["vectors"].at[1, j], d.d_read, VALUES)
                else:
                    correction = registers.load(ref["vectors"].at[0, j], VALUES)
                    d_k = d.d_sum * registers.spread(correction, VALUES)
                    d_k = d_k + before * registers.spread(d.d_read, VALUES)
                    d_q = after * registers.spread(registers.wide(d_o, VALUES), VALUES)
                    d_q, d_k = (jnp.sum(d, axis=1) for d in (d_q, d_k))
                    registers.store(ref["d_keys_rows"].at[0, row], d_q, KEYS)
                    registers.store(ref["d_keys_rows"].at[1, row], d_k, KEYS)
                return before, d.d_before, next_loaded

            store_matrix("states", 0, state)
            after = replay(slot, rows, t0, n, registers.wide(state, STATE), keep=True)
            _, d_state, _ = lax.fori_loop(
                0, n, step, (after, d_state, load(n - 1)), unroll=geometry.unroll_of(n)
            )
            synchronize()  # what follows reads what other warps wrote
            row = t0 - rows.start
            if on_tensor_cores:
                column_sums(
                    ref["states"],
                    ref["d_sums"],
                    ref["d_out_slots"].at[return_slot, pl.ds(t0, n)],
                    ref["vectors"],
                    ref["d_keys_rows"].at[:, pl.ds(row, n)],
                    swizzle,
                    interpret is not None,
                )
            for j in range(n_d_scalars):
                target = ref["d_scalars"].at[block.value_block, block.b, block.head_block, i, j]
                registers.add_lanes(ref["lane_sums"].at[j], target.at[pl.ds(row, history)])
            synchronize()  # what follows overwrites it
            return d_state

        def return_over_chunk(
            n: Any, i: Any, group: Any, rows: range, kept_state: Array, d_state: Array
        ) -> Any:
            """The gradient of these rows of chunk i, which is loaded.

            `kept_state` is the state before its last group, number `group` of the segment.
            """
            slots = tuple(lax.rem(m, SLOTS) for m in n)
            return_stream.start(i - 1, 1 - slots[1])
            return_stream.wait(slots[1])
            wait_for_stores()
            whole, left_over = divmod(len(rows), history)

            def one(group: Any, t0: Any, steps: int, carry: Any) -> Any:
                kept_state, d_state = carry
                # Loaded a group ahead, as it comes from device memory.
                next_state = registers.load(kept(jnp.maximum(group - 1, 0)), STATE)
                d_state = return_over(slots, i, rows, t0, steps, kept_state, d_state)
                return next_state, d_state

            carry = kept_state, d_state
            if left_over:
                carry = one(group, rows.stop - left_over, left_over, carry)
                group = group - 1
            carry = lax.fori_loop(
                0,
                whole,
                lambda j, carry: one(
                    group - j, rows.start + (whole - 1 - j) * history, history, carry
                ),
                carry,
            )
            t = pl.ds(chunks.start(i) + rows.start, len(rows))
            results = pl.ds(0, len(rows))
            start_stores(
                [
                    (
                        ref["d_keys_rows"].at[j, results],
                        block.steps(ref[name].at[block.value_block], KEYS, t),
                    )
                    for j, name in enumerate(("d_q", "d_k"))
                ]
                + [(ref["d_v_rows"].at[results], block.steps(ref["d_v"], VALUES, t))]
            )
            return carry

        def segment(s: Any, n: Any, d_state: Array, count: int, last_rows: range) -> Any:
            """The gradient of segment s, of `count` chunks, of which the last has these rows."""
            base = s * segment_chunks
            before_segment = base - segment_chunks
            state = registers.load(
                ref["checkpoints"].at[block.b, block.heads, s, block.values], STATE
            )
            state = registers.wide(state, STATE)
            whole_chunk = range(size)

            def replay_groups(slot: Any, rows: range, groups: int, group: Any, state: Array) -> Any:
                def one(g: Any, state: Array) -> Array:
                    registers.store(kept(group + g), state, STATE)
                    t0 = rows.start + g * history
                    return replay(slot, rows, t0, history, state, keep=False)

                return lax.fori_loop(0, groups, one, state)

            def replay_chunk(c: Any, carry: Any) -> Any:
                (n_replay, n_return), state = carry
                slot = lax.rem(n_replay, SLOTS)
                replay_stream.start(base + c + 1, 1 - slot)
                replay_stream.wait(slot)
                state = replay_groups(
                    slot, whole_chunk, groups_per_chunk, c * groups_per_chunk, state
                )
                synchronize()  # every warp has read the slot
                return (n_replay + 1, n_return), state

            n, state = lax.fori_loop(0, count - 1, replay_chunk, (n, state))

            # The last chunk stays loaded between its replay and its return.
            slot = lax.rem(n[0], SLOTS)
            c = count - 1
            replay_stream.start(base + c - 1 if count > 1 else before_segment, 1 - slot)
            replay_stream.wait(slot)
            groups = -(-len(last_rows) // history) - 1
            state = replay_groups(slot, last_rows, groups, c * groups_per_chunk, state)
            kept_state, d_state = return_over_chunk(
                n, base + c, c * groups_per_chunk + groups, last_rows, state.astype(dtype), d_state
            )
            n = n[0] + 1, n[1] + 1

            def return_over_earlier(j: Any, carry: Any) -> Any:
                n, kept_state, d_state = carry
                c = count - 2 - j
                slot = lax.rem(n[0], SLOTS)
                next_chunk = jnp.where(c > 0, base + c - 1, before_segment)
                replay_stream.start(next_chunk, 1 - slot)
                replay_stream.wait(slot)
                kept_state, d_state = return_over_chunk(
                    n, base + c, (c + 1) * groups_per_chunk - 1, whole_chunk, kept_state, d_state
                )
                return (n[0] + 1, n[1] + 1), kept_state, d_state

            n, _, d_state = lax.fori_loop(
                0, count - 1, return_over_earlier, (n, kept_state, d_state)
            )
            return n, d_state

        zero = jnp.int32(0)
        n = zero, zero  # chunks that came in each stream
        n_segments = -(-chunks.count // segment_chunks)
        last_start = (n_segments - 1) * segment_chunks
        last_count = chunks.count - last_start
        replay_stream.start(jnp.int32(last_start), zero)
        return_stream.start(jnp.int32(chunks.count - 1), zero)
        source = ref["d_final_state"].at[block.b, block.heads, block.values]
        d_state = registers.load(source, STATE)
        n_alike = n_segments
        if chunks.whole < chunks.count or last_count < segment_chunks:
            n_alike -= 1
            last_rows = chunks.last_rows
            n, d_state = segment(jnp.int32(n_alike), n, d_state, last_count, last_rows)
        if n_alike:
            _, d_state = lax.fori_loop(
                0,
                n_alike,
                lambda j, c: segment(n_alike - 1 - j, c[0], c[1], segment_chunks, range(size)),
                (n, d_state),
            )
        target = ref["d_initial_state"].at[block.b, block.heads, block.values]
        registers.store(target, d_state, STATE)
        wait_for_stores()

    results = run_blocks(
        body,
        n_blocks,
        inputs,
        outputs,
        scratch(geometry, keys, n_scalars, x.has_write_gate, dtype, part),
        warpgroups=geometry.warpgroups,
        approximate=dtype == jnp.bfloat16,
        reduction_bytes=reduction_bytes(dtype),
        interpret=interpret,
    )
    results["d_scalars"] = _in_time(results["d_scalars"], chunks)
    return Gradients(**{name: results[name] for name in Gradients._fields})


def _history_row(keys: int, dtype: Any) -> tuple[int, int]:
    """Elements of a row of the history, and the swizzle of its 16 bytes, in bytes.

    In bfloat16, 8 rows must fall on different banks where the tensor cores load 8 x 8 matrices: an
    odd number of 16 bytes does that, and so does a swizzle of rows of 64 or 128 bytes.
    """
    if dtype != jnp.bfloat16:
        return keys, 16
    if keys in (32, 64):
        return keys, 2 * keys
    return (keys if keys // 8 % 2 else keys + 8), 16


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    rows = len(chunks.last_rows)
    earlier = x[..., :-1, :].reshape(*x.shape[:4], -1)
    return jnp.concatenate([earlier, x[..., -1, :rows]], axis=-1)
