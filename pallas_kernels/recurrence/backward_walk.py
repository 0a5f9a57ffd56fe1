"""A block's way back in time: chunks, from last to first, of groups of steps."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.copies import SLOTS, Chunks, Copies
from pallas_kernels.limits import SAVED_STATE_GROUP
from pallas_kernels.recurrence.backward_block import BlockSteps
from pallas_kernels.recurrence.block import KEYS, VALUES, Block
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS

GROUP = SAVED_STATE_GROUP


@dataclasses.dataclass(frozen=True)
class BlockBackward:
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
        d_state = self._whole_chunks(first, *carry) if chunks.whole else carry[1]
        target = ref["d_initial_state"].at[block.b, block.heads, block.values]
        self.steps.store(target, d_state)
        self.copies.wait_for_stores()

    def _whole_chunks(self, first: int, before: Array, d_state: Array) -> Array:
        """The whole chunks, after `first` others; returns the gradient of the state before them."""
        rows = range(self.chunks.size)
        _, d_state = lax.fori_loop(
            first,
            self.chunks.count,
            lambda n, carry: self._chunk(n, self.chunks.count - 1 - n, rows, carry),
            (before, d_state),
        )
        return d_state

    def _chunk(self, n: Index, i: Index, rows: range, carry: Any) -> Any:
        """Rows of chunk i, the n-th from the end.

        Carry: (saved state before the next group, gradient of the state after it).
        """
        i = jnp.int32(i)
        slot = lax.rem(jnp.int32(n), SLOTS)
        if self.steps.config.in_place:
            # Until the wait, the results of the chunk after may be read from the other slot.
            self.copies.wait(i, slot, newer=0, stores=0)
            self.copies.start(i - 1, 1 - slot)
        else:
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
        self._store_results(slot, i, rows)
        return carry

    def _store_results(self, slot: Index, i: Index, rows: range) -> None:
        """Stores the gradients of these rows of chunk i."""
        ref, block = self.ref, self.block
        t = pl.ds(self.chunks.start(i) + rows.start, len(rows))
        results = pl.ds(0, len(rows))
        d_keys, d_v = self._results(slot, rows.start, 0, len(rows))
        d_q, d_k = (ref[name].at[block.value_block] for name in ("d_q", "d_k"))
        stores = [
            (d_keys.at[0], block.steps(d_q, KEYS, t)),
            (d_keys.at[1], block.steps(d_k, KEYS, t)),
            (d_v, block.steps(ref["d_v"], VALUES, t)),
        ]
        self.copies.start_stores(stores)
        # Between two barriers: that of `start_stores`, and the next of `wait_for_stores`.
        of_chunk = block.value_block, block.b, block.head_block, i
        self.steps.add_scalars(
            partial_scalars=ref["partial_scalars"].at[:, results],
            d_scalars=ref["d_scalars"].at[(*of_chunk, slice(None), results)],
        )

    def _results(self, slot: Index, t: Index, row: Index, n: int) -> tuple[Ref, Ref]:
        """The gradients of q and k, and of v, of n steps whose inputs start at row t of a chunk.

        They start at row t of the slot in place of the inputs, otherwise at `row`.
        """
        ref = self.ref
        if self.steps.config.in_place:
            rows = pl.ds(t, n)
            return ref["keys_slots"].at[:, slot, rows], ref["d_out_slots"].at[slot, rows]
        rows = pl.ds(row, n)
        return ref["d_keys_rows"].at[:, rows], ref["d_v_rows"].at[rows]

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
        row, config = g * GROUP, self.steps.config

        def replay(state: Array, first: int, n: int, **own_states: Ref) -> Array:
            """The state after n steps from step `first` on; those before each are held."""
            at, held = row + first, n - config.first_in_registers
            refs = self._inputs(slot, rows.start + at, at, n) | own_states
            if held and not own_states:
                refs["states"] = self.ref["states"].at[pl.ds(0, held)]
            return self.steps.replay(n, state, **refs)

        def saved(back: Index) -> Array:
            """The saved state before so many groups back, from device memory."""
            group = i * (self.chunks.size // GROUP) + g - back
            return self._saved_state(jnp.maximum(group, 0))

        backpropagate = functools.partial(self._backpropagate, slot, rows, row)
        start = before.astype(jnp.float32)
        if config.halved and n > MMA_STEPS:
            own = {"own_states": self.ref["earlier_states"]}
            middle = replay(start, 0, MMA_STEPS, **own)
            after = replay(middle, MMA_STEPS, n - MMA_STEPS)
            middle = middle.astype(before.dtype)
            d, _ = backpropagate(MMA_STEPS, n - MMA_STEPS, 0, (d, after), middle)
            prefetched = None if self.steps.is_short_of_registers else saved(1)
            carry = d, middle.astype(jnp.float32)
            d, _ = backpropagate(0, MMA_STEPS, 0, carry, **own)
            return saved(1) if prefetched is None else prefetched, d
        after = replay(start, 0, n)
        own_start, before = before, saved(1)  # prefetched
        whole, left_over = divmod(n, MMA_STEPS)
        carry = d, after
        if left_over:
            first = whole * MMA_STEPS
            carry = backpropagate(first, left_over, first, carry, own_start)

        def tile(j: Index, carry: Any) -> Any:
            first = (whole - 1 - j) * MMA_STEPS
            return backpropagate(first, MMA_STEPS, first, carry, own_start)

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
        start: Array | None = None,
        **own_states: Ref,
    ) -> Any:
        """n steps from step `first` on of the group in this row, whose states start at `states`.

        `start` is the state before them, read where `states` has it not.
        """
        (d_state, after), row = carry, row + first
        t = rows.start + row
        return self.steps.backpropagate(
            n,
            d_state,
            after,
            start if self.steps.config.first_in_registers else None,
            **own_states,
            d_keys=self._results(slot, t, row, n)[0],
            **self._backward_refs(slot, t, row, states, n),
        )

    def _backward_refs(
        self, slot: Index, t: Index, row: Index, states: Index, n: int
    ) -> dict[str, Ref]:
        """Refs that `backpropagate` takes, `d_keys` left out, for n steps from row t of a chunk on.

        Their scalars start at `row`, and so do results that are not in place; their states start at
        `states`.
        """
        ref, config = self.ref, self.steps.config
        return {
            **self._inputs(slot, t, row, n),
            "q": ref["q_slots"].at[slot, pl.ds(t, n)],
            "states": ref["states"].at[pl.ds(states, min(MMA_STEPS, config.states_held))],
            "d_out": ref["d_out_slots"].at[slot, pl.ds(t, n)],
            "d_v": self._results(slot, t, row, n)[1],
            "partial_scalars": ref["partial_scalars"].at[:, pl.ds(row, n)],
        }
