"""The backward kernel: each block replays its columns and carries their gradient back in time.

Segments, of the steps between two checkpoints, go by from last to first. In each, the steps are
first replayed in order, to leave the state before each group of `history` steps in device memory (a
few states per head, whatever T is). Then, from last to first, a group is replayed again with every
state kept in shared memory, and walked back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
from pallas_kernels.fragments import STEPS
from pallas_kernels.geometry import Geometry
from pallas_kernels.gradient_steps import StepKind
from pallas_kernels.layouts import HEADS, KEYS, VALUES, WARPS
from pallas_kernels.operands import Operands
from pallas_kernels.steps import Steps


class Gradients(NamedTuple):
    """P blocks of columns give a part each of what is a sum over columns, all but `d_scalars` and
    `d_initial_state` in the dtype of inputs."""

    d_q: Array  # [P, B, T, H, N]
    d_k: Array  # [P, B, T, H, N]
    d_v: Array  # [B, T, H, V]
    d_scalars: Array  # [P, B, H, S, T] float32: of decay, then of the write gate if there is one
    d_initial_state: Array  # [B, H, V, N] float32


def scratch(
    geometry: Geometry,
    keys: int,
    n_scalars: int,
    has_write_gate: bool,
    dtype: Any,
) -> dict[str, Any]:
    """The shared memory of a warpgroup, by name."""
    heads, values, chunk = geometry.heads, geometry.values, geometry.chunk
    keys_slots = plgpu.SMEM((SLOTS, chunk, heads, keys), dtype)
    errors_slots = plgpu.SMEM((SLOTS, chunk, heads, values), jnp.float32)
    scalars_slots = plgpu.SMEM((SLOTS, heads, n_scalars, scalars_at_once(chunk)), jnp.float32)
    return {
        "replay_k": keys_slots,
        "replay_errors": errors_slots,
        "replay_scalars": scalars_slots,
        "replay_loaded": plgpu.Barrier(num_arrivals=3),
        "back_k": keys_slots,
        "back_q": keys_slots,
        "back_errors": errors_slots,
        "back_d_out": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "back_scalars": scalars_slots,
        "back_loaded": plgpu.Barrier(num_arrivals=5),
        "states": plgpu.SMEM((geometry.history, heads, values, keys), dtype),
        "d_keys_rows": plgpu.SMEM((2, chunk, heads, keys), dtype),  # of q and of k
        "d_v_rows": plgpu.SMEM((chunk, heads, values), dtype),
        "partial_scalars": plgpu.SMEM((1 + has_write_gate, chunk, WARPS, 4), jnp.float32),
    }


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
    """The gradients of `forward`, from its checkpoints; one is every so many steps.

    `x.v` holds the errors that `forward` kept.
    """
    batch, _, n_heads, keys = x.q.shape
    n_values = x.v.shape[-1]
    dtype = x.q.dtype
    exact = dtype != jnp.bfloat16
    heads, values, size = geometry.heads, geometry.values, geometry.chunk
    value_blocks = n_values // values
    n_blocks = batch * (n_heads // heads) * value_blocks
    chunks = Chunks(x.time, size)
    segment_chunks = checkpoint_every // size
    history = geometry.history
    n_groups = size // history  # of a chunk
    replays = segment_chunks * n_groups > 1  # to know the state before each group
    n_d_scalars = 1 + x.has_write_gate
    kind = StepKind(x.has_write_gate, x.has_keep, linear_state)
    steps = Steps(kind, geometry, keys, exact, interpret is not None)

    inputs = {
        "q": x.q,
        "k": x.k,
        "errors": x.v,
        "scalars": x.scalars,
        "d_out": d_out,
        "d_final_state": d_final_state,
        "checkpoints": checkpoints,
    }
    d_keys = jax.ShapeDtypeStruct((value_blocks, batch, x.time, n_heads, keys), dtype)
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
            (n_blocks, segment_chunks * n_groups, heads, values, keys), dtype
        ),
    }

    def body(index: Any, group: Any, ref: dict[str, Any]) -> None:
        block = Block.from_index(index, n_heads, n_values, heads, values)
        replay_stream = Stream(
            block,
            chunks,
            [
                Input(ref["k"], ref["replay_k"], KEYS),
                Input(ref["errors"], ref["replay_errors"], VALUES),
                Input(ref["scalars"], ref["replay_scalars"], HEADS),
            ],
            ref["replay_loaded"],
            group,
            interpret,
        )
        back_stream = Stream(
            block,
            chunks,
            [
                Input(ref["k"], ref["back_k"], KEYS),
                Input(ref["q"], ref["back_q"], KEYS),
                Input(ref["errors"], ref["back_errors"], VALUES),
                Input(ref["d_out"], ref["back_d_out"], VALUES),
                Input(ref["scalars"], ref["back_scalars"], HEADS),
            ],
            ref["back_loaded"],
            group,
            interpret,
        )

        def state_before(c: Any, g: Any) -> Any:
            """The state before group g of chunk c of the segment."""
            return ref["replayed"].at[index, c * n_groups + g]

        def replay(slot: Any, c: Any, rows: range, is_last: bool, state: Array) -> Array:
            """These rows of chunk c of the segment; not the last group, if it is the last."""
            groups = -(-len(rows) // history) - is_last

            def group(g: Any, state: Array) -> Array:
                steps.store(state_before(c, g), state.astype(dtype))
                t = rows.start + g * history
                return steps.replay(
                    history,
                    state,
                    k=ref["replay_k"].at[slot, pl.ds(t, history)],
                    errors=ref["replay_errors"].at[slot, pl.ds(t, history)],
                    scalars=ref["replay_scalars"].at[slot, :, :, pl.ds(g * history, history)],
                )

            return lax.fori_loop(0, groups, group, state)

        def rows_back(slot: Any, i: Any, c: Any, rows: range, carry: Any) -> Any:
            """These rows of chunk i, chunk c of the segment.

            Carries the state before the group at hand and the gradient of the state after it.
            """

            def inputs_of_replay(t: Any, row: Any, n: int) -> dict[str, Any]:
                return {
                    "k": ref["back_k"].at[slot, pl.ds(t, n)],
                    "errors": ref["back_errors"].at[slot, pl.ds(t, n)],
                    "scalars": ref["back_scalars"].at[slot, :, :, pl.ds(row, n)],
                }

            def walk_back(row: Any, first: Any, n: int, carry: Any) -> Any:
                """n steps from step `first` on of the group in this row of the results."""
                row = row + first
                t = rows.start + row
                return steps.walk_back(
                    n,
                    *carry,
                    **inputs_of_replay(t, row, n),
                    q=ref["back_q"].at[slot, pl.ds(t, n)],
                    states=ref["states"].at[pl.ds(first, STEPS)],
                    d_out=ref["back_d_out"].at[slot, pl.ds(t, n)],
                    d_v=ref["d_v_rows"].at[pl.ds(row, n)],
                    d_keys=ref["d_keys_rows"].at[:, pl.ds(row, n)],
                    partial_scalars=ref["partial_scalars"].at[:, pl.ds(row, n)],
                )

            def group(g: Any, n: int, carry: Any) -> Any:
                start, d = carry
                row = g * history
                t = rows.start + row
                after = steps.replay(
                    n,
                    start.astype(jnp.float32),
                    **inputs_of_replay(t, row, n),
                    states=ref["states"].at[pl.ds(0, n)],
                )
                if replays:
                    # Loaded a group ahead, as it comes from device memory.
                    start = steps.load(state_before(0, jnp.maximum(c * n_groups + g - 1, 0)))
                whole, left_over = divmod(n, STEPS)
                carry = d, after
                if left_over:
                    carry = walk_back(row, whole * STEPS, left_over, carry)
                carry = lax.fori_loop(
                    0,
                    whole,
                    lambda j, carry: walk_back(row, (whole - 1 - j) * STEPS, STEPS, carry),
                    carry,
                )
                return start, carry[0]

            whole, left_over = divmod(len(rows), history)
            if left_over:
                carry = group(whole, left_over, carry)
            return lax.fori_loop(
                0, whole, lambda j, carry: group(whole - 1 - j, history, carry), carry
            )

        def chunk_back(n: Any, i: Any, c: Any, rows: range, carry: Any) -> Any:
            slot = lax.rem(n, SLOTS)
            back_stream.start(i - 1, 1 - slot)
            back_stream.wait(slot)
            wait_for_stores()
            carry = rows_back(slot, i, c, rows, carry)
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
                + [(ref["d_v_rows"].at[results], block.steps(ref["d_v"], VALUES, t))],
                group,
                interpret,
            )
            of_chunk = block.value_block, block.b, block.head_block, i
            steps.add_scalars(
                partial_scalars=ref["partial_scalars"].at[:, results],
                d_scalars=ref["d_scalars"].at[(*of_chunk, slice(None), results)],
            )
            return carry

        def segment(s: Any, n: Any, d_state: Array, count: int, last_rows: range) -> Any:
            """The gradient of segment s, of `count` chunks, of which the last has these rows.

            n counts the chunks that came in each stream.
            """
            base = s * segment_chunks
            n_replay, n_back = n
            checkpoint = ref["checkpoints"].at[block.b, block.heads, s, block.values]
            state = steps.load(checkpoint).astype(jnp.float32)

            def replay_chunk(c: Any, carry: Any, rows: range, is_last: bool) -> Any:
                n, state = carry
                slot = lax.rem(n, SLOTS)
                following = base - segment_chunks if is_last else base + c + 1
                replay_stream.start(following, 1 - slot)
                replay_stream.wait(slot)
                state = replay(slot, c, rows, is_last, state)
                synchronize(interpret)  # every warp has read the slot
                return n + 1, state

            def next_chunk_back(j: Any, carry: Any, rows: range) -> Any:
                n, carry = carry
                c = count - 1 - j
                return n + 1, chunk_back(n, base + c, c, rows, carry)

            if replays:
                carry = lax.fori_loop(
                    0,
                    count - 1,
                    lambda c, carry: replay_chunk(c, carry, range(size), False),
                    (n_replay, state),
                )
                n_replay, state = replay_chunk(count - 1, carry, last_rows, True)
            carry, first = (n_back, (state.astype(dtype), d_state)), 0
            if len(last_rows) < size:
                carry, first = next_chunk_back(0, carry, last_rows), 1
            n_back, (_, d_state) = lax.fori_loop(
                first, count, lambda j, carry: next_chunk_back(j, carry, range(size)), carry
            )
            return (n_replay, n_back), d_state

        zero = jnp.int32(0)
        n = zero, zero
        n_segments = -(-chunks.count // segment_chunks)
        last_start = (n_segments - 1) * segment_chunks
        last_count = chunks.count - last_start
        if replays:
            replay_stream.start(jnp.int32(last_start), zero)
        back_stream.start(jnp.int32(chunks.count - 1), zero)
        d_state = steps.load(ref["d_final_state"].at[block.b, block.heads, block.values])
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
        steps.store(ref["d_initial_state"].at[block.b, block.heads, block.values], d_state)
        wait_for_stores()

    results = run_blocks(
        body,
        n_blocks,
        inputs,
        outputs,
        scratch(geometry, keys, x.scalars.shape[2], x.has_write_gate, dtype),
        warpgroups=geometry.warpgroups,
        approximate=not exact,
        interpret=interpret,
    )
    results["d_scalars"] = _in_time(results["d_scalars"], chunks)
    return Gradients(**{name: results[name] for name in Gradients._fields})


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    rows = len(chunks.last_rows)
    earlier = x[..., :-1, :].reshape(*x.shape[:4], -1)
    return jnp.concatenate([earlier, x[..., -1, :rows]], axis=-1)
