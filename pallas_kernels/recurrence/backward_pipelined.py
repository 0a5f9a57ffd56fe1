"""A block's way back in time where its groups of steps are pipelined."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.copies import SLOTS
from pallas_kernels.recurrence.backward_walk import GROUP, BlockBackward
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS


class PipelinedBackward(BlockBackward):
    """Each group is replayed during the backpropagation through the group after it.

    The states of odd groups lie after those of even ones.
    """

    def _whole_chunks(self, first: int, before: Array, d_state: Array) -> Array:
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
            lambda n, carry: self._chunk_pipelined(n, self.chunks.count - 1 - n, carry),
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

    def _chunk_pipelined(self, n: Index, i: Index, carry: Any) -> Any:
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
            return self._group_pipelined(slot, i, row, earlier_slot, earlier_row, carry)

        carry = lax.fori_loop(0, size // GROUP, group, carry)
        d_keys, _ = self._results(slot, 0, 0, MMA_STEPS)
        self.steps.add_d_keys(sums=self.ref["sums"].at[1], d_keys=d_keys)
        self._store_results(slot, i, range(size))
        return carry

    def _group_pipelined(
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
            at = row + first
            backward = self._backward_refs(slot, at, at, _parity(group) * GROUP + first, MMA_STEPS)
            later = at + MMA_STEPS
            earlier_d_keys, _ = self._results(slot, later, later, MMA_STEPS)
            return self.steps.backpropagate_and_replay(
                *carry,
                replayed=self._replay_refs(
                    earlier_slot, earlier_row, group - 1, MMA_STEPS * j, MMA_STEPS
                ),
                sums={
                    "sums": self.ref["sums"].at[j],
                    "earlier_sums": self.ref["sums"].at[1 - j],
                    "earlier_d_keys": earlier_d_keys,
                },
                **backward,
            )

        d, after, state = lax.fori_loop(0, GROUP // MMA_STEPS, half, (d, after, state))
        return before, state, d


def _parity(group: Index) -> Array:
    return lax.bitwise_and(jnp.int32(group), jnp.int32(1))
