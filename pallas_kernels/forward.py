"""The forward kernel: each block carries the state of its columns through time in registers."""

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
    wait_for_stores,
)
from pallas_kernels.geometry import Geometry
from pallas_kernels.layouts import HEADS, KEYS, STATE, VALUES
from pallas_kernels.operands import Operands, load_step


def scratch(
    geometry: Geometry, keys: int, n_scalars: int, dtype: Any, keep_errors: bool
) -> dict[str, Any]:
    """The shared memory of a warpgroup, by name."""
    heads, values, chunk = geometry.heads, geometry.values, geometry.chunk
    memory = {
        "q_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "k_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "v_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, scalars_at_once(chunk)), jnp.float32),
        "out_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "loaded": plgpu.Barrier(num_arrivals=4),
    }
    if keep_errors:
        memory["errors_slots"] = plgpu.SMEM((SLOTS, chunk, heads, values), jnp.float32)
    return memory


class Kept(NamedTuple):
    """What the backward pass needs."""

    checkpoints: Array  # [B, H, checkpoints, V, N]
    errors: Array | None  # [B, T, H, V] float32: v - S^T k; None where it is computed again


def forward(
    x: Operands,
    initial_state: Array | None,
    geometry: Geometry,
    saved_state_interval: int | None,
    keep_errors: bool,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Kept | None]:
    """Returns out `[B, T, H, V]`, the final state `[B, H, V, N]` and what is kept, if wanted, all
    with the padding of whole blocks.

    Checkpoint i is the state before step `i * saved_state_interval`, in v's dtype. Of the steps
    between two and of a chunk, one is a multiple of the other.
    """
    batch, _, n_heads, n_state = x.q.shape
    sizes = geometry.padded(n_heads, x.v.shape[-1], n_state)
    dtype = x.v.dtype
    chunks = Chunks(x.time, geometry.chunk)
    # Steps between the places where there may be a checkpoint.
    span = min(saved_state_interval or geometry.chunk, geometry.chunk)
    registers = geometry.registers(sizes.keys, dtype, interpret is not None)
    n_scalars = x.scalars.shape[2]

    inputs = {"q": x.q, "k": x.k, "v": x.v, "scalars": x.scalars}
    if initial_state is not None:
        inputs["initial_state"] = initial_state
    columns = batch, x.time, sizes.heads, sizes.values
    outputs = {
        "out": jax.ShapeDtypeStruct(columns, dtype),
        "final_state": jax.ShapeDtypeStruct((batch, *sizes), jnp.float32),
    }
    if saved_state_interval is not None:
        n_checkpoints = -(-x.time // saved_state_interval)
        outputs["checkpoints"] = jax.ShapeDtypeStruct(
            (batch, sizes.heads, n_checkpoints, sizes.values, sizes.keys), dtype
        )
    if keep_errors:
        outputs["errors"] = jax.ShapeDtypeStruct(columns, jnp.float32)

    def body(index: Any, warpgroup: Any, ref: dict[str, Any]) -> None:
        block = Block.from_index(index, sizes, geometry)
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
            warpgroup,
            interpret,
        )

        def keep(i: Any, state: Array) -> None:
            """The state before step `i * span`, if there is a checkpoint."""
            if saved_state_interval is None:
                return
            apart = saved_state_interval // span

            @pl.when(lax.rem(i, apart) == 0)
            def _() -> None:
                of_block = block.b, block.heads, lax.div(i, apart), block.values
                registers.store(ref["checkpoints"].at[of_block], state, STATE)

        def chunk(i: Any, state: Array, rows: range = range(chunks.size)) -> Array:
            """These rows of chunk i."""
            slot = lax.rem(i, SLOTS)
            stream.start(i + 1, 1 - slot)
            k, v, scalars = (ref[name].at[slot] for name in ("k_slots", "v_slots", "scalars_slots"))

            def load(t: Any) -> cell.Step:
                return load_step(registers, x, k, v, scalars, t, rows.start)

            def step(t: Any, carry: Any) -> Any:
                # Loaded a step ahead: a warp issues in order, and would wait for them.
                state, read, inputs = carry
                q = registers.load(ref["q_slots"].at[slot, t], KEYS)
                next_inputs = load(jnp.minimum(t + 1, rows.stop - 1))
                update = cell.update(registers, state, read, inputs, linear_state)
                state, row = update.state, t - rows.start
                if keep_errors:
                    registers.store(ref["errors_slots"].at[slot, row], update.error, VALUES)
                # What the next step reads and o_t are sums over the same state.
                read, out = cell.read(registers, state, next_inputs.k, q)
                registers.store(ref["out_slots"].at[slot, row], out, VALUES)
                return state, read, next_inputs

            stream.wait(slot)
            # The slot of the results was read by the copy started two chunks ago.
            wait_for_stores(SLOTS - 1)
            inputs = load(rows.start)
            (read,) = cell.read(registers, state, inputs.k)
            carry = state, read, inputs
            whole, left_over = divmod(len(rows), span)

            def steps(j: Any, carry: Any, n: int = span) -> Any:
                """The n steps of span j of these rows."""
                keep(i * (chunks.size // span) + j, carry[0])
                first, unroll = rows.start + j * span, geometry.unroll_of(n)
                return lax.fori_loop(
                    0, n, lambda t, carry: step(first + t, carry), carry, unroll=unroll
                )

            carry = lax.fori_loop(0, whole, steps, carry)
            if left_over:
                carry = steps(whole, carry, left_over)
            state = carry[0]
            t = pl.ds(chunks.start(i) + rows.start, len(rows))
            names = ("out", "errors") if keep_errors else ("out",)
            start_stores(
                [
                    (
                        ref[f"{name}_slots"].at[slot, pl.ds(0, len(rows))],
                        block.steps(ref[name], VALUES, t),
                    )
                    for name in names
                ],
                warpgroup,
                interpret,
            )
            return state

        stream.start(jnp.int32(0), jnp.int32(0))
        if initial_state is None:
            state = registers.full(0.0)
        else:
            source = ref["initial_state"].at[block.b, block.heads, block.values]
            state = registers.load(source, STATE)
        state = lax.fori_loop(0, chunks.whole, chunk, state)
        if chunks.whole < chunks.count:
            state = chunk(jnp.int32(chunks.whole), state, chunks.last_rows)
        registers.store(ref["final_state"].at[block.b, block.heads, block.values], state, STATE)
        wait_for_stores()

    results = run_blocks(
        "e88_forward",
        body,
        batch * geometry.blocks(sizes),
        inputs,
        outputs,
        scratch(geometry, sizes.keys, n_scalars, dtype, keep_errors),
        warpgroups=geometry.warpgroups,
        approximate=dtype == jnp.bfloat16,
        interpret=interpret,
    )
    kept = None
    if saved_state_interval is not None:
        kept = Kept(results["checkpoints"], results.get("errors"))
    return results["out"], results["final_state"], kept
