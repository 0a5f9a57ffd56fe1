"""The backward kernel: each block replays its columns and carries their gradient back in time.

Time goes by in groups of 8 steps, from last to first. A group is replayed from the saved state
before it, with every state kept in shared memory, and then backpropagated through.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Interpret, Ref
from pallas_kernels.common.copies import SLOTS, Chunks, Copies
from pallas_kernels.common.launch import run_blocks
from pallas_kernels.limits import SAVED_STATE_GROUP
from pallas_kernels.recurrence.backward_block import BlockSteps, block_steps
from pallas_kernels.recurrence.backward_lanes import StepKind
from pallas_kernels.recurrence.block import HEADS, KEYS, VALUES, Block
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS
from pallas_kernels.recurrence.operands import Operands
from pallas_kernels.recurrence.scratch import backward_scratch
from pallas_kernels.recurrence.tuning_config import TuningConfig

GROUP = SAVED_STATE_GROUP


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

    def body(index: Index, warpgroup: Index, ref: dict[str, Ref]) -> None:
        block = Block.from_index(index, sizes, config)
        axes = {"k": KEYS, "q": KEYS, "delta": VALUES, "d_out": VALUES, "scalars": HEADS}
        copies = block.copies(axes, ref, chunks, config, warpgroup, interpret)
        _BlockBackward(ref, block, chunks, steps, copies).run()

    results = run_blocks(
        "e88_backward",
        body,
        batch * config.blocks(sizes),
        inputs,
        outputs,
        backward_scratch(config, sizes.keys, x.scalars.shape[2], x.has_write_gate, dtype),
        warpgroups=config.warpgroups,
        approximate=not exact,
        interpret=interpret,
    )
    results["d_scalars"] = _in_time(results["d_scalars"], chunks)
    return Gradients(**{name: results[name] for name in Gradients._fields})


@dataclasses.dataclass(frozen=True)
class _BlockBackward:
    """The backward pass of a block: chunks, from last to first, of groups of steps.

    "Rows" are the steps of a chunk that count: all, or some of the last chunk.
    """

    ref: dict[str, Ref]
    block: Block
    chunks: Chunks
    steps: BlockSteps
    copies: Copies

    def _saved_state(self, group: Index) -> Array:
        """The saved state before this group, counted from the first step, in its dtype."""
        of_block = self.block.b, self.block.heads, group, self.block.values
        return self.steps.load(self.ref["saved_states"].at[of_block])

    def run(self) -> None:
        ref, block, chunks = self.ref, self.block, self.chunks
        last = chunks.count - 1
        self.copies.start(jnp.int32(last), jnp.int32(0))
        before = self._saved_state(jnp.int32((chunks.time - 1) // GROUP))
        d_state = self.steps.load(ref["d_final_state"].at[block.b, block.heads, block.values])
        carry, first = (before, d_state), 0
        if chunks.whole < chunks.count:
            carry, first = self._chunk(0, last, chunks.last_rows, carry), 1
        if self.steps.config.pipelined and chunks.whole:
            d_state = self._pipelined_chunks(first, *carry)
        else:
            rows = range(chunks.size)
            _, d_state = lax.fori_loop(
                first,
                chunks.count,
                lambda n, carry: self._chunk(n, last - n, rows, carry),
                carry,
            )
        target = ref["d_initial_state"].at[block.b, block.heads, block.values]
        self.steps.store(target, d_state)
        self.copies.wait_for_stores()

    def _chunk(self, n: Index, i: Index, rows: range, carry: Any) -> Any:
        """Rows of chunk i, the n-th from the end.

        Carry: (saved state before the next group, gradient of the state after it).
        """
        i = jnp.int32(i)
        slot = lax.rem(jnp.int32(n), SLOTS)
        self.copies.start(i - 1, 1 - slot)
        self.copies.wait(i, slot, newer=1, stores=0)
        whole, left_over = divmod(len(rows), GROUP)
        if left_over:
            carry = self._group(slot, i, rows, whole, left_over, carry)
        carry = lax.fori_loop(
            0,
            whole,
            lambda j, carry: self._group(slot, i, rows, whole - 1 - j, GROUP, carry),
            carry,
        )
        self._store_results(i, rows)
        return carry

    def _store_results(self, i: Index, rows: range) -> None:
        """Stores the gradients of these rows of chunk i."""
        ref, block = self.ref, self.block
        t = pl.ds(self.chunks.start(i) + rows.start, len(rows))
        results = pl.ds(0, len(rows))
        d_q, d_k = (ref[name].at[block.value_block] for name in ("d_q", "d_k"))
        stores = [
            (ref["d_keys_rows"].at[0, results], block.steps(d_q, KEYS, t)),
            (ref["d_keys_rows"].at[1, results], block.steps(d_k, KEYS, t)),
            (ref["d_v_rows"].at[results], block.steps(ref["d_v"], VALUES, t)),
        ]
        self.copies.start_stores(stores)
        # Between two barriers: that of `start_stores`, and the next of `wait_for_stores`.
        of_chunk = block.value_block, block.b, block.head_block, i
        self.steps.add_scalars(
            partial_scalars=ref["partial_scalars"].at[:, results],
            d_scalars=ref["d_scalars"].at[(*of_chunk, slice(None), results)],
        )

    def _pipelined_chunks(self, first: int, before: Array, d_state: Array) -> Array:
        """The whole chunks, after `first` others; returns the gradient of the state before them.

        Each group is replayed during the backpropagation through the group after it: the states of
        odd groups lie after those of even ones.
        """
        last_group = self.chunks.whole * self.chunks.size // GROUP - 1
        slot = first % SLOTS
        self.copies.wait(jnp.int32(self.chunks.count - 1 - first), jnp.int32(slot), newer=0)
        after = self.steps.replay(
            GROUP,
            before.astype(jnp.float32),
            **self._replay_refs(slot, self.chunks.size - GROUP, last_group, 0, GROUP),
        )
        before = self._saved_state(jnp.int32(max(last_group - 1, 0)))
        _, _, d_state = lax.fori_loop(
            first,
            self.chunks.count,
            lambda n, carry: self._pipelined_chunk(n, self.chunks.count - 1 - n, carry),
            (before, after, d_state),
        )
        return d_state

    def _replay_refs(
        self, slot: Index, row: Index, group: Index, first: Index, n: int
    ) -> dict[str, Ref]:
        """Refs that `replay` takes for n steps from step `first` on of the group in this row."""
        row = row + first
        return {
            **self._inputs(slot, row, row, n),
            "states": self.ref["states"].at[pl.ds(_parity(group) * GROUP + first, n)],
        }

    def _pipelined_chunk(self, n: Index, i: Index, carry: Any) -> Any:
        """Chunk i, the n-th from the end.

        Carry: (saved state before group g - 1, state after group g, gradient of that state); group
        g is already replayed.
        """
        i, size = jnp.int32(i), self.chunks.size
        slot = lax.rem(jnp.int32(n), SLOTS)
        self.copies.start(i - 1, 1 - slot)
        self.copies.wait_for_stores()

        def group(j: Index, carry: Any) -> Any:
            row = size - GROUP * (j + 1)
            is_first = row == 0

            @pl.when(is_first & (i > 0))
            def _() -> None:
                self.copies.wait(i - 1, 1 - slot, newer=0)

            # Before the first chunk there is nothing: that replay is not used.
            earlier_slot = jnp.where(is_first, 1 - slot, slot)
            earlier_row = jnp.where(is_first, size, row) - GROUP
            return self._pipelined_group(slot, i, row, earlier_slot, earlier_row, carry)

        carry = lax.fori_loop(0, size // GROUP, group, carry)
        self.steps.add_d_keys(sums=self.ref["sums"].at[1], d_keys=self._d_keys(0, MMA_STEPS))
        self._store_results(i, range(size))
        return carry

    def _pipelined_group(
        self, slot: Index, i: Index, row: Index, earlier_slot: Index, earlier_row: Index, carry: Any
    ) -> Any:
        """Backpropagates through the group in a row of chunk i, and replays the one before it."""
        before, after, d = carry
        group = i * (self.chunks.size // GROUP) + lax.div(jnp.int32(row), jnp.int32(GROUP))
        state = before.astype(jnp.float32)
        # Prefetched: it comes from device memory.
        before = self._saved_state(jnp.maximum(group - 2, 0))

        def half(j: Index, carry: Any) -> Any:
            first = GROUP - MMA_STEPS * (j + 1)
            backward = self._backward_refs(
                slot, row + first, row + first, _parity(group) * GROUP + first, MMA_STEPS
            )
            return self.steps.backpropagate_and_replay(
                *carry,
                replayed=self._replay_refs(
                    earlier_slot, earlier_row, group - 1, MMA_STEPS * j, MMA_STEPS
                ),
                sums={
                    "sums": self.ref["sums"].at[j],
                    "earlier_sums": self.ref["sums"].at[1 - j],
                    "earlier_d_keys": self._d_keys(row + first + MMA_STEPS, MMA_STEPS),
                },
                **backward,
            )

        d, after, state = lax.fori_loop(0, GROUP // MMA_STEPS, half, (d, after, state))
        return before, state, d

    def _d_keys(self, row: Index, n: int) -> Ref:
        """The gradients of q and k of n steps from this row on."""
        return self.ref["d_keys_rows"].at[:, pl.ds(row, n)]

    def _inputs(self, slot: Index, t: Index, row: Index, n: int) -> dict[str, Ref]:
        """Inputs of n steps from row t of a chunk on, whose scalars start at `row`."""
        ref = self.ref
        return {
            "k": ref["k_slots"].at[slot, pl.ds(t, n)],
            "delta": ref["delta_slots"].at[slot, pl.ds(t, n)],
            "scalars": ref["scalars_slots"].at[slot, :, :, pl.ds(row, n)],
        }

    def _group(self, slot: Index, i: Index, rows: range, g: Index, n: int, carry: Any) -> Any:
        """The n steps of group g of these rows of chunk i."""
        before, d = carry
        row = g * GROUP

        def replay(state: Array, first: int, n: int) -> Array:
            """The state after n steps from step `first` on; those before each are held."""
            at = row + first
            return self.steps.replay(
                n,
                state,
                **self._inputs(slot, rows.start + at, at, n),
                states=self.ref["states"].at[pl.ds(0, n)],
            )

        def saved(back: Index) -> Array:
            """The saved state before so many groups back, from device memory."""
            group = i * (self.chunks.size // GROUP) + g - back
            return self._saved_state(jnp.maximum(group, 0))

        start = before.astype(jnp.float32)
        if n > self.steps.config.states_held:

            def half(j: Index, carry: Any, n: int = MMA_STEPS) -> Any:
                """The n steps of the second half, then of the first."""
                start, d = carry
                first = MMA_STEPS * (1 - j)
                after = replay(start, first, n)
                start = saved(j)  # prefetched: of the first half, then of the group before
                d, _ = self._backpropagate(slot, rows, row, first, n, 0, (d, after))
                return start.astype(jnp.float32), d

            carry = replay(start, 0, MMA_STEPS), d
            if n == GROUP:
                start, d = lax.fori_loop(0, 2, half, carry)
            else:
                start, d = half(1, half(0, carry, n - MMA_STEPS))
            return start.astype(before.dtype), d
        after = replay(start, 0, n)
        before = saved(1)  # prefetched
        whole, left_over = divmod(n, MMA_STEPS)
        carry = d, after
        if left_over:
            first = whole * MMA_STEPS
            carry = self._backpropagate(slot, rows, row, first, left_over, first, carry)

        def tile(j: Index, carry: Any) -> Any:
            first = (whole - 1 - j) * MMA_STEPS
            return self._backpropagate(slot, rows, row, first, MMA_STEPS, first, carry)

        carry = lax.fori_loop(0, whole, tile, carry)
        return before, carry[0]

    def _backpropagate(
        self,
        slot: Index,
        rows: range,
        row: Index,
        first: Index,
        n: int,
        states: Index,
        carry: Any,
    ) -> Any:
        """n steps from step `first` on of the group in this row, whose states start at `states`."""
        row = row + first
        return self.steps.backpropagate(
            n,
            *carry,
            d_keys=self._d_keys(row, n),
            **self._backward_refs(slot, rows.start + row, row, states, n),
        )

    def _backward_refs(
        self, slot: Index, t: Index, row: Index, states: Index, n: int
    ) -> dict[str, Ref]:
        """Refs that `backpropagate` takes, `d_keys` left out, for n steps from row t of a chunk on.

        Their scalars and results start at `row`, their states at `states`.
        """
        ref = self.ref
        return {
            **self._inputs(slot, t, row, n),
            "q": ref["q_slots"].at[slot, pl.ds(t, n)],
            "states": ref["states"].at[pl.ds(states, MMA_STEPS)],
            "d_out": ref["d_out_slots"].at[slot, pl.ds(t, n)],
            "d_v": ref["d_v_rows"].at[pl.ds(row, n)],
            "partial_scalars": ref["partial_scalars"].at[:, pl.ds(row, n)],
        }


def _parity(group: Index) -> Array:
    return lax.bitwise_and(jnp.int32(group), jnp.int32(1))


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    rows = len(chunks.last_rows)
    earlier = x[..., :-1, :].reshape(*x.shape[:4], -1)
    return jnp.concatenate([earlier, x[..., -1, :rows]], axis=-1)
