"""The backward kernel: each block replays its columns and carries their gradient back in time.

Segments, of the chunks between two checkpoints, go by from last to first. In each, the chunks are
first replayed in order, to leave the state before each in device memory (a few states per head,
whatever T is). Then, from last to first, a chunk is replayed again with every state kept in shared
memory, and its gradient is taken step by step. What is not on the critical path from one step to
the one before it, the sums that make the gradients of q and k, is done once for each chunk.
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
    scalars_at_once,
    start_stores,
    wait_for_stores,
)
from pallas_kernels.column_sums import column_sums
from pallas_kernels.layouts import HEADS, KEYS, STATE, VALUES
from pallas_kernels.operands import Operands, load_step
from pallas_kernels.tuning import Geometry


class Gradients(NamedTuple):
    """P blocks of columns give a part each of what is a sum over columns."""

    d_q: Array  # [P, B, T, H, N]
    d_k: Array  # [P, B, T, H, N]
    d_v: Array  # [B, T, H, V]
    d_scalars: Array  # [P, B, H, S, T] float32: of decay, then of the write gate if there is one
    d_initial_state: Array  # [B, H, V, N] float32


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    checkpoints: Array,
    geometry: Geometry,
    chunks_per_checkpoint: int,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    """The gradients of `forward`, whose checkpoints these are, in the same geometry of chunks."""
    batch, time, n_heads, keys = x.q.shape
    n_values = x.v.shape[-1]
    dtype = x.v.dtype
    heads, values = geometry.heads, geometry.values
    value_blocks = n_values // values
    n_blocks = batch * (n_heads // heads) * value_blocks
    chunks = Chunks(time, geometry.chunk)
    size = chunks.size
    registers = geometry.registers(keys, interpret is not None)
    n_scalars = x.scalars.shape[2]
    n_d_scalars = 1 + x.has_write_gate
    on_tensor_cores = dtype == jnp.bfloat16
    part = dtype if value_blocks == 1 else jnp.float32

    inputs = {
        "q": x.q,
        "k": x.k,
        "v": x.v,
        "scalars": x.scalars,
        "d_out": d_out,
        "d_final_state": d_final_state,
        "checkpoints": checkpoints,
    }
    outputs = {
        "d_q": jax.ShapeDtypeStruct((value_blocks, *x.q.shape), part),
        "d_k": jax.ShapeDtypeStruct((value_blocks, *x.q.shape), part),
        "d_v": jax.ShapeDtypeStruct(x.v.shape, dtype),
        "d_scalars": jax.ShapeDtypeStruct(
            (value_blocks, batch, n_heads // heads, chunks.count, n_d_scalars, size, heads),
            jnp.float32,
        ),
        "d_initial_state": jax.ShapeDtypeStruct((batch, n_heads, n_values, keys), jnp.float32),
        # The state before each chunk of a segment: not a result.
        "replayed": jax.ShapeDtypeStruct(
            (n_blocks, chunks_per_checkpoint, heads, values, keys), dtype
        ),
    }

    def smem(shape: tuple[int, ...], of: Any = dtype) -> Any:
        return plgpu.SMEM(shape, of)

    lanes = registers.lane_sums_shape[1]
    history = (heads, values, _padded_row(keys, dtype))
    scratch = {
        "k_slots": smem((SLOTS, size, heads, keys)),
        "v_slots": smem((SLOTS, size, heads, values)),
        "scalars_slots": smem((SLOTS, heads, n_scalars, scalars_at_once(size)), jnp.float32),
        "q_slots": smem((SLOTS, size, heads, keys)),
        "d_out_slots": smem((SLOTS, size, heads, values)),
        "states": smem((size + 1, *history)),
        "corrections": smem((size, heads, values), dtype),
        "d_q_rows": smem((size, heads, keys), part),
        "d_k_rows": smem((size, heads, keys), part),
        "d_v_rows": smem((size, heads, values)),
        "lane_sums": smem((n_d_scalars, size, heads, lanes), jnp.float32),
        "replay_loaded": plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
        "return_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
    }
    if on_tensor_cores:
        scratch |= {"d_sums": smem((size, *history)), "d_reads": smem((size, heads, values))}
    if x.has_write_gate:
        scratch |= {"errors": smem((size, heads, values), jnp.float32)}

    def body(*refs: Any) -> None:
        ref = dict(zip([*inputs, *outputs, *scratch], refs, strict=True))
        index = lax.axis_index("block")
        block = Block.from_index(index, n_heads, n_values, heads, values)
        replay_slots = ref["k_slots"], ref["v_slots"], ref["scalars_slots"]
        replay_stream = Stream(
            block,
            chunks,
            [
                Input(ref["k"], ref["k_slots"], KEYS),
                Input(ref["v"], ref["v_slots"], VALUES),
                Input(ref["scalars"], ref["scalars_slots"], HEADS),
            ],
            ref["replay_loaded"],
        )
        return_stream = Stream(
            block,
            chunks,
            [Input(ref["q"], ref["q_slots"], KEYS), Input(ref["d_out"], ref["d_out_slots"], VALUES)],
            ref["return_loaded"],
        )

        def state_at(t: Any, name: str = "states") -> Any:
            return ref[name].at[t, :, :, pl.ds(0, keys)]

        def replay(slot: Any, t: Any, state: Array) -> Array:
            inputs = load_step(registers, x, replay_slots, slot, t, 0)
            return cell.update(registers, state, inputs, linear_state).state

        def replay_and_keep(slot: Any, first: int, t: Any, state: Array) -> Array:
            inputs = load_step(registers, x, replay_slots, slot, t, first)
            state, error, correction = cell.update(registers, state, inputs, linear_state)
            registers.store(state_at(t + 1), state, STATE)
            registers.store(ref["corrections"].at[t], correction, VALUES)
            if x.has_write_gate:
                registers.store(ref["errors"].at[t], error, VALUES)
            return state

        def step_back(slot: Any, return_slot: Any, first: int, t: Any, carry: Any) -> Any:
            after, d_after = carry
            row = t - first
            inputs = load_step(registers, x, replay_slots, slot, t, first)
            q = registers.load(ref["q_slots"].at[return_slot, t], KEYS)
            d_o = registers.load(ref["d_out_slots"].at[return_slot, t], VALUES)
            before = registers.load(state_at(t), STATE)
            d = cell.step_back(registers, after, d_after, q, d_o, inputs, linear_state)
            registers.store(ref["d_v_rows"].at[row], d.d_v, VALUES)
            d_decay = registers.lane_sums(d.d_sum * before, STATE)
            registers.store_lane_sums(ref["lane_sums"].at[0, t], d_decay)
            if x.has_write_gate:
                error = registers.load(ref["errors"].at[t], VALUES)
                d_gate = registers.lane_sums(d.d_correction * error, VALUES)
                registers.store_lane_sums(ref["lane_sums"].at[1, t], d_gate)
            if on_tensor_cores:
                registers.store(state_at(t, "d_sums"), d.d_sum, STATE)
                registers.store(ref["d_reads"].at[t], d.d_read, VALUES)
            else:
                correction = registers.load(ref["corrections"].at[t], VALUES)
                d_k = d.d_sum * registers.spread(correction, VALUES)
                d_k = d_k + before * registers.spread(d.d_read, VALUES)
                d_q = after * registers.spread(d_o, VALUES)
                registers.store(ref["d_q_rows"].at[row], jnp.sum(d_q, axis=1), KEYS)
                registers.store(ref["d_k_rows"].at[row], jnp.sum(d_k, axis=1), KEYS)
            return before, d.d_before

        def return_over(i: Any, n: Any, state: Array, d_state: Array, next_i: Any, first: int) -> Any:
            """The gradient of steps `first` and later of chunk i, the n-th of each stream."""
            n_replay, n_return = n
            slot, return_slot = lax.rem(n_replay, SLOTS), lax.rem(n_return, SLOTS)
            replay_stream.start(next_i, 1 - slot)
            return_stream.start(i - 1, 1 - return_slot)
            replay_stream.wait(slot)
            registers.store(state_at(first), state, STATE)
            unroll = geometry.unroll_of(size - first)
            state = lax.fori_loop(
                first, size, lambda t, s: replay_and_keep(slot, first, t, s), state, unroll=unroll
            )
            if on_tensor_cores:
                for t in range(first):  # finite, for the products that leave them out
                    registers.store(state_at(t), registers.full(0.0), STATE)
                    registers.store(state_at(t, "d_sums"), registers.full(0.0), STATE)
            return_stream.wait(return_slot)
            wait_for_stores()
            _, d_state = lax.fori_loop(
                0,
                size - first,
                lambda t, c: step_back(slot, return_slot, first, size - 1 - t, c),
                (state, d_state),
                unroll=unroll,
            )
            plgpu.commit_smem()  # what follows reads what other warps wrote
            if on_tensor_cores:
                column_sums(
                    ref["states"],
                    ref["d_sums"],
                    ref["d_out_slots"].at[return_slot],
                    ref["corrections"],
                    ref["d_reads"],
                    ref["d_q_rows"],
                    ref["d_k_rows"],
                    first,
                    interpret is not None,
                )
            for j in range(n_d_scalars):
                target = ref["d_scalars"].at[block.value_block, block.b, block.head_block, i, j]
                registers.add_lanes(ref["lane_sums"].at[j], target)
            t = pl.ds(chunks.start(i) + first, size - first)
            rows = pl.ds(0, size - first)
            start_stores(
                [
                    (ref["d_q_rows"].at[rows], block.steps(ref["d_q"].at[block.value_block], KEYS, t)),
                    (ref["d_k_rows"].at[rows], block.steps(ref["d_k"].at[block.value_block], KEYS, t)),
                    (ref["d_v_rows"].at[rows], block.steps(ref["d_v"], VALUES, t)),
                ]
            )
            return (n_replay + 1, n_return + 1), d_state

        def segment(s: Any, n: Any, d_state: Array, count: int, first: int) -> Any:
            """The gradient of segment s, of `count` chunks; steps `first` and later of its last."""
            base = s * chunks_per_checkpoint
            before_segment = s * chunks_per_checkpoint - chunks_per_checkpoint
            state = registers.load(
                ref["checkpoints"].at[block.b, block.heads, s, block.values], STATE
            )

            def keep(c: Any, state: Array) -> None:
                registers.store(ref["replayed"].at[index, c], state, STATE)

            def kept(c: Any) -> Array:
                return registers.load(ref["replayed"].at[index, c], STATE)

            def replay_chunk(c: Any, carry: Any) -> Any:
                (n_replay, n_return), state = carry
                slot = lax.rem(n_replay, SLOTS)
                replay_stream.start(base + c + 1, 1 - slot)
                keep(c, state)
                replay_stream.wait(slot)
                state = lax.fori_loop(
                    0, size, lambda t, s: replay(slot, t, s), state, unroll=geometry.unroll
                )
                plgpu.commit_smem()  # every warp has read the slot
                return (n_replay + 1, n_return), state

            n, state = lax.fori_loop(0, count - 1, replay_chunk, (n, state))

            def next_after(c: Any) -> Any:
                return jnp.where(c > 0, base + c - 1, before_segment)

            n, d_state = return_over(
                base + count - 1, n, state, d_state, next_after(jnp.int32(count - 1)), first
            )

            def return_over_earlier(j: Any, carry: Any) -> Any:
                n, d_state = carry
                c = count - 2 - j
                return return_over(base + c, n, kept(c), d_state, next_after(c), 0)

            return lax.fori_loop(0, count - 1, return_over_earlier, (n, d_state))

        first = size - chunks.left_over if chunks.left_over else 0
        n_segments = -(-chunks.count // chunks_per_checkpoint)
        last_count = chunks.count - (n_segments - 1) * chunks_per_checkpoint
        last_start = (n_segments - 1) * chunks_per_checkpoint
        zero = jnp.int32(0)
        replay_stream.start(jnp.int32(last_start), zero)
        return_stream.start(jnp.int32(chunks.count - 1), zero)
        n = zero, zero
        d_state = registers.load(
            ref["d_final_state"].at[block.b, block.heads, block.values], STATE
        )
        n_alike = n_segments
        if first or last_count < chunks_per_checkpoint:
            n_alike -= 1
            n, d_state = segment(jnp.int32(n_alike), n, d_state, last_count, first)
        if n_alike:
            _, d_state = lax.fori_loop(
                0,
                n_alike,
                lambda j, c: segment(n_alike - 1 - j, *c, chunks_per_checkpoint, 0),
                (n, d_state),
            )
        registers.store(
            ref["d_initial_state"].at[block.b, block.heads, block.values], d_state, STATE
        )
        wait_for_stores()

    d_q, d_k, d_v, d_scalars, d_initial_state, _ = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(n_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=dtype == jnp.bfloat16,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )(*inputs.values())
    return Gradients(d_q, d_k, d_v, _in_time(d_scalars, chunks), d_initial_state)


def _padded_row(keys: int, dtype: Any) -> int:
    """Keys of a row of the history: of bfloat16, an odd number of 16 bytes.

    8 rows then fall on different banks, both where lanes hold neighbouring columns and where the
    tensor cores load 8 x 8 matrices.
    """
    per_16_bytes = 8
    return keys + per_16_bytes if dtype == jnp.bfloat16 and keys // per_16_bytes % 2 == 0 else keys


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    whole = x[..., : chunks.whole, :].reshape(*x.shape[:4], -1)
    if not chunks.left_over:
        return whole
    return jnp.concatenate([whole, x[..., -1, chunks.size - chunks.left_over :]], axis=-1)
