"""The forward kernel: each block carries the state of its columns through time in registers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Interpret, Ref
from pallas_kernels.common.copies import SLOTS, Chunks
from pallas_kernels.common.launch import run_blocks
from pallas_kernels.recurrence import forward_step
from pallas_kernels.recurrence.block import HEADS, KEYS, STATE, VALUES, Block
from pallas_kernels.recurrence.forward_registers import registers_of
from pallas_kernels.recurrence.operands import Operands, load_step
from pallas_kernels.recurrence.scratch import forward_scratch
from pallas_kernels.recurrence.tuning_config import TuningConfig


class Saved(NamedTuple):
    """Arrays that the forward pass saves for the backward pass."""

    states: Array  # [B, H, saved states, V, N]
    delta: Array | None  # [B, T, H, V] float32: v - S^T k; None where it is recomputed


def forward(
    x: Operands,
    initial_state: Array | None,
    config: TuningConfig,
    saved_state_interval: int | None,
    save_delta: bool,
    *,
    linear_state: bool,
    interpret: Interpret = None,
) -> tuple[Array, Array, Saved | None]:
    """Returns out `[B, T, H, V]`, the final state `[B, H, V, N]` and what is saved, if anything.

    All have the padding of whole blocks. Saved state i is the state before step
    `i * saved_state_interval`, in v's dtype. Of the interval and the chunk, one divides the other.
    """
    batch, _, n_heads, n_state = x.q.shape
    sizes = config.padded(n_heads, x.v.shape[-1], n_state)
    dtype = x.v.dtype
    chunks = Chunks(x.time, config.chunk)
    # Steps between the places where a state may be saved.
    span = min(saved_state_interval or config.chunk, config.chunk)
    registers = registers_of(config, sizes.keys, dtype, interpret)
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
        n_saved = -(-x.time // saved_state_interval)
        outputs["saved_states"] = jax.ShapeDtypeStruct(
            (batch, sizes.heads, n_saved, sizes.values, sizes.keys), dtype
        )
    if save_delta:
        outputs["delta"] = jax.ShapeDtypeStruct(columns, jnp.float32)

    def body(index: Index, warpgroup: Index, ref: dict[str, Ref]) -> None:
        block = Block.from_index(index, sizes, config)
        axes = {"q": KEYS, "k": KEYS, "v": VALUES, "scalars": HEADS}
        copies = block.copies(axes, ref, chunks, config, warpgroup, interpret)

        def save(i: Index, state: Array) -> None:
            """Saves the state before step `i * span`, if that is a saved state."""
            if saved_state_interval is None:
                return
            apart = saved_state_interval // span

            @pl.when(lax.rem(i, apart) == 0)
            def _() -> None:
                of_block = block.b, block.heads, lax.div(i, apart), block.values
                registers.store(ref["saved_states"].at[of_block], state, STATE)

        def chunk(i: Index, state: Array, rows: range = range(chunks.size)) -> Array:
            """These rows of chunk i."""
            slot = lax.rem(i, SLOTS)
            result_slot = lax.rem(i, config.result_slots)
            copies.start(i + 1, 1 - slot)
            k, v, scalars = (ref[name].at[slot] for name in ("k_slots", "v_slots", "scalars_slots"))

            def load(t: Index) -> forward_step.Step:
                return load_step(registers, x, k, v, scalars, t, rows.start)

            def step(t: Index, carry: Any) -> Any:
                # Software pipelining: a warp issues in order, and would wait for its own loads.
                state, read, inputs = carry
                q = registers.load(ref["q_slots"].at[slot, t], KEYS)
                next_inputs = load(jnp.minimum(t + 1, rows.stop - 1))
                update = forward_step.update(registers, state, read, inputs, linear_state)
                state, row = update.state, t - rows.start
                if save_delta:
                    registers.store(ref["delta_slots"].at[result_slot, row], update.delta, VALUES)
                # The next step's S^T k and o_t are sums over the same state.
                read, out = forward_step.read(registers, state, next_inputs.k, q)
                registers.store(ref["out_slots"].at[result_slot, row], out, VALUES)
                return state, read, next_inputs

            # The stores of the last chunk that had this slot of the results have read it.
            copies.wait(i, slot, newer=1, stores=config.result_slots - 1)
            inputs = load(rows.start)
            (read,) = forward_step.read(registers, state, inputs.k)
            carry = state, read, inputs
            whole, left_over = divmod(len(rows), span)

            def steps(j: Index, carry: Any, n: int = span) -> Any:
                """The n steps of span j of these rows."""
                save(i * (chunks.size // span) + j, carry[0])
                first, unroll = rows.start + j * span, config.unroll_of(n)
                return lax.fori_loop(
                    0, n, lambda t, carry: step(first + t, carry), carry, unroll=unroll
                )

            carry = lax.fori_loop(0, whole, steps, carry)
            if left_over:
                carry = steps(whole, carry, left_over)
            state = carry[0]
            t = pl.ds(chunks.start(i) + rows.start, len(rows))
            names = ("out", "delta") if save_delta else ("out",)
            copies.start_stores(
                [
                    (
                        ref[f"{name}_slots"].at[result_slot, pl.ds(0, len(rows))],
                        block.steps(ref[name], VALUES, t),
                    )
                    for name in names
                ]
            )
            return state

        copies.start(jnp.int32(0), jnp.int32(0))
        if initial_state is None:
            state = registers.full(0.0)
        else:
            source = ref["initial_state"].at[block.b, block.heads, block.values]
            state = registers.load(source, STATE)
        state = lax.fori_loop(0, chunks.whole, chunk, state)
        if chunks.whole < chunks.count:
            state = chunk(jnp.int32(chunks.whole), state, chunks.last_rows)
        registers.store(ref["final_state"].at[block.b, block.heads, block.values], state, STATE)
        copies.wait_for_stores()

    results = run_blocks(
        "e88_forward",
        body,
        batch * config.blocks(sizes),
        inputs,
        outputs,
        forward_scratch(config, sizes.keys, n_scalars, dtype, save_delta),
        warpgroups=config.warpgroups,
        approximate=dtype == jnp.bfloat16,
        interpret=interpret,
    )
    saved = None
    if saved_state_interval is not None:
        saved = Saved(results["saved_states"], results.get("delta"))
    return results["out"], results["final_state"], saved
