"""The forward kernel: each block carries the state of its columns through time in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cell
from pallas_kernels.blocks import SLOTS, Block, Chunks, Input, Stream, scalars_at_once, start_stores, wait_for_stores
from pallas_kernels.layouts import HEADS, KEYS, STATE, VALUES
from pallas_kernels.operands import Operands, load_step
from pallas_kernels.tuning import Geometry


def forward(
    x: Operands,
    initial_state: Array | None,
    geometry: Geometry,
    chunks_per_checkpoint: int | None,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Array | None]:
    """Returns out `[B, T, H, V]`, the final state `[B, H, V, N]` and checkpoints, if wanted.

    Checkpoint i, of `[B, H, checkpoints, V, N]`, is the state before chunk
    `i * chunks_per_checkpoint` in v's dtype.
    """
    batch, time, n_heads, keys = x.q.shape
    n_values = x.v.shape[-1]
    dtype = x.v.dtype
    heads, values = geometry.heads, geometry.values
    chunks = Chunks(time, geometry.chunk)
    registers = geometry.registers(keys, interpret is not None)
    n_scalars = x.scalars.shape[2]

    inputs = {"q": x.q, "k": x.k, "v": x.v, "scalars": x.scalars}
    if initial_state is not None:
        inputs["initial_state"] = initial_state
    outputs = {
        "out": jax.ShapeDtypeStruct(x.v.shape, dtype),
        "final_state": jax.ShapeDtypeStruct((batch, n_heads, n_values, keys), jnp.float32),
    }
    if chunks_per_checkpoint is not None:
        n_checkpoints = -(-chunks.count // chunks_per_checkpoint)
        outputs["checkpoints"] = jax.ShapeDtypeStruct(
            (batch, n_heads, n_checkpoints, n_values, keys), dtype
        )
    scratch = {
        "q_slots": plgpu.SMEM((SLOTS, geometry.chunk, heads, keys), dtype),
        "k_slots": plgpu.SMEM((SLOTS, geometry.chunk, heads, keys), dtype),
        "v_slots": plgpu.SMEM((SLOTS, geometry.chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, scalars_at_once(chunks.size)), jnp.float32),
        "out_slots": plgpu.SMEM((SLOTS, geometry.chunk, heads, values), dtype),
        "loaded": plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
    }

    def body(*refs: Any) -> None:
        ref = dict(zip([*inputs, *outputs, *scratch], refs, strict=True))
        block = Block.from_index(lax.axis_index("block"), n_heads, n_values, heads, values)
        stream = Stream(
            block,
            chunks,
            [
                Input(ref["q"], ref["q_slots"], KEYS),
                Input(ref["k"], ref["k_slots"], KEYS),
                Input(ref["v"], ref["v_slots"], VALUES),
                Input(ref["scalars"], ref["scalars_slots"], HEADS),
            ],
            ref["loaded"],
        )

        def step(slot: Any, first: int, t: Any, state: Array) -> Array:
            q = registers.load(ref["q_slots"].at[slot, t], KEYS)
            slots = ref["k_slots"], ref["v_slots"], ref["scalars_slots"]
            inputs = load_step(registers, x, slots, slot, t, first)
            state = cell.update(registers, state, inputs, linear_state).state
            out = cell.read(registers, state, q)
            registers.store(ref["out_slots"].at[slot, t - first], out, VALUES)
            return state

        def chunk(i: Any, state: Array, first: int = 0) -> Array:
            """Steps `first` and later of chunk i."""
            slot = lax.rem(i, SLOTS)
            stream.start(i + 1, 1 - slot)
            if chunks_per_checkpoint is not None:
                checkpoint, rest = lax.div(i, chunks_per_checkpoint), lax.rem(i, chunks_per_checkpoint)

                @pl.when(rest == 0)
                def _() -> None:
                    target = ref["checkpoints"].at[block.b, block.heads, checkpoint, block.values]
                    registers.store(target, state, STATE)

            stream.wait(slot)
            # The slot of the results was read by the copy started two chunks ago.
            wait_for_stores(SLOTS - 1)
            state = lax.fori_loop(
                first, chunks.size, functools.partial(step, slot, first), state, unroll=geometry.unroll_of(chunks.size-first)
            )
            steps = chunks.size - first
            t = pl.ds(chunks.start(i) + first, steps)
            results = ref["out_slots"].at[slot, pl.ds(0, steps)]
            start_stores([(results, block.steps(ref["out"], VALUES, t))])
            return state

        stream.start(jnp.int32(0), jnp.int32(0))
        if initial_state is None:
            state = registers.full(0.0)
        else:
            state = registers.load(ref["initial_state"].at[block.b, block.heads, block.values], STATE)
        state = lax.fori_loop(0, chunks.whole, chunk, state)
        if chunks.left_over:
            state = chunk(jnp.int32(chunks.whole), state, chunks.size - chunks.left_over)
        registers.store(ref["final_state"].at[block.b, block.heads, block.values], state, STATE)
        wait_for_stores()

    n_blocks = batch * (n_heads // heads) * (n_values // values)
    results = plgpu.kernel(
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
    out, final_state, *checkpoints = results
    return out, final_state, checkpoints[0] if checkpoints else None

