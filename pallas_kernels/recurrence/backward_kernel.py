"""The backward kernel: each block replays its columns and carries their gradient back in time.

Time goes by in groups of 8 steps, from last to first. A group is replayed from the saved state
before it, with its states kept in shared memory, or some of those of its first half in device
memory, and then backpropagated through.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.aliases import Index, Interpret, Ref
from pallas_kernels.common.copies import Chunks
from pallas_kernels.common.launch import run_blocks
from pallas_kernels.recurrence.backward_block import block_steps
from pallas_kernels.recurrence.backward_lanes import StepKind
from pallas_kernels.recurrence.backward_pipelined import PipelinedBackward
from pallas_kernels.recurrence.backward_walk import BlockBackward
from pallas_kernels.recurrence.block import HEADS, KEYS, VALUES, Block
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS
from pallas_kernels.recurrence.operands import Operands
from pallas_kernels.recurrence.scratch import backward_scratch
from pallas_kernels.recurrence.tuning_config import TuningConfig


class Gradients(NamedTuple):
    """Gradients with the padding of whole blocks.

    Sums over columns come as P partial sums (split V), one of each block of columns. All but
    `d_scalars` and `d_initial_state` have the dtype of the inputs.
    """

    d_q: Array  # [P, B, T, H, N]
    d_k: Array  # [P, B, T, H, N]
    d_v: Array  # [B, T, H, V]
    d_scalars: Array  # [P, B, H, S, T] float32: of decay, then of the write gate if there is one
    d_initial_state: Array  # [B, H, V, N] float32


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    saved_states: Array,
    config: TuningConfig,
    *,
    linear_state: bool,
    interpret: Interpret = None,
) -> Gradients:
    """The gradients of `forward`, from its saved states, one before each group of steps.

    `x.v` holds the delta that `forward` saved.
    """
    batch, _, n_heads, n_state = x.q.shape
    sizes = config.padded(n_heads, d_out.shape[-1], n_state)
    dtype = x.q.dtype
    exact = dtype != jnp.bfloat16
    value_blocks, head_blocks = sizes.values // config.values, sizes.heads // config.heads
    chunks = Chunks(x.time, config.chunk)
    kind = StepKind(x.has_write_gate, x.has_keep, x.has_live, linear_state)
    steps = block_steps(kind, config, sizes.keys, exact, interpret)

    inputs = {
        "q": x.q,
        "k": x.k,
        "delta": x.v,
        "scalars": x.scalars,
        "d_out": d_out,
        "d_final_state": d_final_state,
        "saved_states": saved_states,
    }
    d_keys = jax.ShapeDtypeStruct((value_blocks, batch, x.time, sizes.heads, sizes.keys), dtype)
    d_scalars = value_blocks, batch, head_blocks, chunks.count, 1 + x.has_write_gate
    outputs = {
        "d_q": d_keys,
        "d_k": d_keys,
        "d_v": jax.ShapeDtypeStruct((batch, x.time, sizes.heads, sizes.values), dtype),
        "d_scalars": jax.ShapeDtypeStruct((*d_scalars, chunks.size, config.heads), jnp.float32),
        "d_initial_state": jax.ShapeDtypeStruct((batch, *sizes), jnp.float32),
    }

    n_blocks = batch * config.blocks(sizes)
    if config.halved:
        # Memory of each block, read by none but the lanes that wrote it.
        of_block = MMA_STEPS, config.heads, config.values, sizes.keys
        outputs["earlier_states"] = jax.ShapeDtypeStruct((n_blocks, *of_block), dtype)

    def body(index: Index, warpgroup: Index, ref: dict[str, Ref]) -> None:
        block = Block.from_index(index, sizes, config)
        if config.halved:
            ref["earlier_states"] = ref["earlier_states"].at[index]
        if config.in_place:
            ref |= {"q_slots": ref["keys_slots"].at[0], "k_slots": ref["keys_slots"].at[1]}
        axes = {"k": KEYS, "q": KEYS, "delta": VALUES, "d_out": VALUES, "scalars": HEADS}
        copies = block.copies(axes, ref, chunks, config, warpgroup, interpret)
        walk = PipelinedBackward if config.pipelined else BlockBackward
        walk(ref, block, chunks, steps, copies).run()

    results = run_blocks(
        "e88_backward",
        body,
        n_blocks,
        inputs,
        outputs,
        backward_scratch(config, sizes.keys, x.scalars.shape[2], x.has_write_gate, dtype),
        warpgroups=config.warpgroups,
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
