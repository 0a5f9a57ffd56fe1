"""The backward kernel: each block replays its columns and carries their gradient back in time.

Groups of steps go by from last to first. Each is replayed from the state before it, which `forward`
kept, with every state kept in shared memory, and then walked back.
"""

import dataclasses
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
    wait_for_stores,
)
from pallas_kernels.fragments import STEPS
from pallas_kernels.geometry import GROUP, Geometry
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
    ahead = {}
    if geometry.ahead:
        # Of each half of a group, by warp: tiles of 16 keys, lanes, and what a lane has of one.
        of_half = WARPS, keys // 16, 32, 4
        ahead["sums"] = plgpu.SMEM((GROUP // STEPS, *of_half), jnp.float32)
    return {
        "k_slots": keys_slots,
        "q_slots": keys_slots,
        "errors_slots": plgpu.SMEM((SLOTS, chunk, heads, values), jnp.float32),
        "d_out_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, scalars_at_once(chunk)), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=5),
        "states": plgpu.SMEM(((1 + geometry.ahead) * GROUP, heads, values, keys), dtype),
        # Of q and of k; the rows past the chunk are never read.
        "d_keys_rows": plgpu.SMEM((2, chunk + STEPS * geometry.ahead, heads, keys), dtype),
        "d_v_rows": plgpu.SMEM((chunk, heads, values), dtype),
        "partial_scalars": plgpu.SMEM((1 + has_write_gate, chunk, WARPS, 4), jnp.float32),
        **ahead,
    }


def backward(
    x: Operands,
    d_out: Array,
    d_final_state: Array,
    checkpoints: Array,
    geometry: Geometry,
    *,
    linear_state: bool,
    interpret: Any = None,
) -> Gradients:
    """The gradients of `forward`, from its checkpoints, one before each group of steps.

    `x.v` holds the errors that `forward` kept.
    """
    batch, _, n_heads, n_state = x.q.shape
    sizes = geometry.padded(n_heads, d_out.shape[-1], n_state)
    dtype = x.q.dtype
    exact = dtype != jnp.bfloat16
    value_blocks, head_blocks = sizes.values // geometry.values, sizes.heads // geometry.heads
    chunks = Chunks(x.time, geometry.chunk)
    kind = StepKind(x.has_write_gate, x.has_keep, x.has_live, linear_state)
    steps = Steps(kind, geometry, sizes.keys, exact, interpret is not None)

    inputs = {
        "q": x.q,
        "k": x.k,
        "errors": x.v,
        "scalars": x.scalars,
        "d_out": d_out,
        "d_final_state": d_final_state,
        "checkpoints": checkpoints,
    }
    d_keys = jax.ShapeDtypeStruct((value_blocks, batch, x.time, sizes.heads, sizes.keys), dtype)
    d_scalars = value_blocks, batch, head_blocks, chunks.count, 1 + x.has_write_gate
    outputs = {
        "d_q": d_keys,
        "d_k": d_keys,
        "d_v": jax.ShapeDtypeStruct((batch, x.time, sizes.heads, sizes.values), dtype),
        "d_scalars": jax.ShapeDtypeStruct((*d_scalars, chunks.size, geometry.heads), jnp.float32),
        "d_initial_state": jax.ShapeDtypeStruct((batch, *sizes), jnp.float32),
    }

    def body(index: Any, warpgroup: Any, ref: dict[str, Any]) -> None:
        block = Block.from_index(index, sizes, geometry)
        _WayBack(ref, block, chunks, steps, warpgroup, interpret).go()

    results = run_blocks(
        "e88_backward",
        body,
        batch * geometry.blocks(sizes),
        inputs,
        outputs,
        scratch(geometry, sizes.keys, x.scalars.shape[2], x.has_write_gate, dtype),
        warpgroups=geometry.warpgroups,
        approximate=not exact,
        interpret=interpret,
    )
    results["d_scalars"] = _in_time(results["d_scalars"], chunks)
    return Gradients(**{name: results[name] for name in Gradients._fields})


@dataclasses.dataclass(frozen=True)
class _WayBack:
    """A block's way back in time: chunks, of groups of steps.

    "Rows" are steps of a chunk: all, or those of the last chunk that are to be worked on.
    """

    ref: dict[str, Any]
    block: Block
    chunks: Chunks
    steps: Steps
    warpgroup: Any
    interpret: Any

    @property
    def _stream(self) -> Stream:
        axes = {"k": KEYS, "q": KEYS, "errors": VALUES, "d_out": VALUES, "scalars": HEADS}
        ref = self.ref
        return Stream(
            self.block,
            self.chunks,
            [Input(ref[x], ref[f"{x}_slots"], of) for x, of in axes.items()],
            ref["loaded"],
            self.warpgroup,
            self.interpret,
        )

    def _state_before(self, group: Any) -> Array:
        """The state before this group of all, as it is kept."""
        of_block = self.block.b, self.block.heads, group, self.block.values
        return self.steps.load(self.ref["checkpoints"].at[of_block])

    def go(self) -> None:
        ref, block, chunks = self.ref, self.block, self.chunks
        last = chunks.count - 1
        self._stream.start(jnp.int32(last), jnp.int32(0))
        before = self._state_before(jnp.int32((chunks.time - 1) // GROUP))
        d_state = self.steps.load(ref["d_final_state"].at[block.b, block.heads, block.values])
        carry, first = (before, d_state), 0
        if chunks.whole < chunks.count:
            carry, first = self._chunk(0, last, chunks.last_rows, carry), 1
        if self.steps.geometry.ahead and chunks.whole:
            d_state = self._whole_chunks_ahead(first, *carry)
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
        wait_for_stores()

    def _chunk(self, n: Any, i: Any, rows: range, carry: Any) -> Any:
        """Rows of chunk i, after n others.

        Carries the state before the group at hand and the gradient of the state after it.
        """
        i = jnp.int32(i)
        slot = lax.rem(jnp.int32(n), SLOTS)
        self._stream.start(i - 1, 1 - slot)
        self._stream.wait(slot)
        wait_for_stores()
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

    def _store_results(self, i: Any, rows: range) -> None:
        """What came of these rows of chunk i."""
        ref, block = self.ref, self.block
        t = pl.ds(self.chunks.start(i) + rows.start, len(rows))
        results = pl.ds(0, len(rows))
        d_q, d_k = (ref[name].at[block.value_block] for name in ("d_q", "d_k"))
        stores = [
            (ref["d_keys_rows"].at[0, results], block.steps(d_q, KEYS, t)),
            (ref["d_keys_rows"].at[1, results], block.steps(d_k, KEYS, t)),
            (ref["d_v_rows"].at[results], block.steps(ref["d_v"], VALUES, t)),
        ]
        start_stores(stores, self.warpgroup, self.interpret)
        # After a barrier, that of `start_stores`; one of `wait_for_stores` is before what follows.
        of_chunk = block.value_block, block.b, block.head_block, i
        self.steps.add_scalars(
            partial_scalars=ref["partial_scalars"].at[:, results],
            d_scalars=ref["d_scalars"].at[(*of_chunk, slice(None), results)],
        )

    def _whole_chunks_ahead(self, first: int, before: Array, d_state: Array) -> Array:
        """The whole chunks, after `first` others; returns the gradient of the state before them.

        Each group is replayed while the one after it is walked back: the states of odd groups are
        after those of even ones.
        """
        last_group = self.chunks.whole * self.chunks.size // GROUP - 1
        slot = first % SLOTS
        self._stream.wait(slot)
        after = self.steps.replay(
            GROUP,
            before.astype(jnp.float32),
            **self._replayed(slot, self.chunks.size - GROUP, last_group, 0, GROUP),
        )
        before = self._state_before(jnp.int32(max(last_group - 1, 0)))
        _, _, d_state = lax.fori_loop(
            first,
            self.chunks.count,
            lambda n, carry: self._chunk_ahead(n, self.chunks.count - 1 - n, carry),
            (before, after, d_state),
        )
        return d_state

    def _replayed(self, slot: Any, row: Any, group: Any, first: Any, n: int) -> dict[str, Any]:
        """What `replay` takes for n steps from step `first` on of a group of all, in a row."""
        row = row + first
        return {
            **self._inputs(slot, row, row, n),
            "states": self.ref["states"].at[pl.ds(_parity(group) * GROUP + first, n)],
        }

    def _chunk_ahead(self, n: Any, i: Any, carry: Any) -> Any:
        """Chunk i, after n others.

        Carries the state before the group before the group at hand, the state after the group at
        hand, whose states are known, and its gradient.
        """
        i, size = jnp.int32(i), self.chunks.size
        slot = lax.rem(jnp.int32(n), SLOTS)
        self._stream.start(i - 1, 1 - slot)
        wait_for_stores()

        def step_back(j: Any, carry: Any) -> Any:
            row = size - GROUP * (j + 1)
            is_first = row == 0

            @pl.when(is_first & (i > 0))
            def _() -> None:
                self._stream.wait(1 - slot)

            # Before the first chunk there is nothing: what is replayed then is not used.
            slot_ahead = jnp.where(is_first, 1 - slot, slot)
            row_ahead = jnp.where(is_first, size, row) - GROUP
            return self._group_ahead(slot, i, row, slot_ahead, row_ahead, carry)

        carry = lax.fori_loop(0, size // GROUP, step_back, carry)
        self.steps.add_d_keys(sums=self.ref["sums"].at[1], d_keys=self._d_keys(0, STEPS))
        self._store_results(i, range(size))
        return carry

    def _group_ahead(
        self, slot: Any, i: Any, row: Any, slot_ahead: Any, row_ahead: Any, carry: Any
    ) -> Any:
        """Walks back the group in a row of chunk i, and replays the one before it."""
        before, after, d = carry
        group = i * (self.chunks.size // GROUP) + lax.div(jnp.int32(row), jnp.int32(GROUP))
        state = before.astype(jnp.float32)
        # Loaded a group ahead, as it comes from device memory.
        before = self._state_before(jnp.maximum(group - 2, 0))

        def half(j: Any, carry: Any) -> Any:
            first = GROUP - STEPS * (j + 1)
            walked = self._walked(
                slot, row + first, row + first, _parity(group) * GROUP + first, STEPS
            )
            return self.steps.walk_back_and_replay(
                *carry,
                ahead=self._replayed(slot_ahead, row_ahead, group - 1, STEPS * j, STEPS),
                sums={
                    "sums": self.ref["sums"].at[j],
                    "earlier_sums": self.ref["sums"].at[1 - j],
                    "earlier_d_keys": self._d_keys(row + first + STEPS, STEPS),
                },
                **walked,
            )

        d, after, state = lax.fori_loop(0, GROUP // STEPS, half, (d, after, state))
        return before, state, d

    def _d_keys(self, row: Any, n: int) -> Any:
        """Where the gradients of q and k are put together, of n steps from a row on."""
        return self.ref["d_keys_rows"].at[:, pl.ds(row, n)]

    def _inputs(self, slot: Any, t: Any, row: Any, n: int) -> dict[str, Any]:
        """What is replayed: n steps from t on of a chunk, whose scalars are from `row` on."""
        ref = self.ref
        return {
            "k": ref["k_slots"].at[slot, pl.ds(t, n)],
            "errors": ref["errors_slots"].at[slot, pl.ds(t, n)],
            "scalars": ref["scalars_slots"].at[slot, :, :, pl.ds(row, n)],
        }

    def _group(self, slot: Any, i: Any, rows: range, g: Any, n: int, carry: Any) -> Any:
        """The n steps of group g of these rows of chunk i."""
        before, d = carry
        row = g * GROUP
        after = self.steps.replay(
            n,
            before.astype(jnp.float32),
            **self._inputs(slot, rows.start + row, row, n),
            states=self.ref["states"].at[pl.ds(0, n)],
        )
        # Loaded a group ahead, as it comes from device memory.
        before = self._state_before(jnp.maximum(i * (self.chunks.size // GROUP) + g - 1, 0))
        whole, left_over = divmod(n, STEPS)
        carry = d, after
        if left_over:
            carry = self._walk_back(slot, rows, row, whole * STEPS, left_over, carry)
        carry = lax.fori_loop(
            0,
            whole,
            lambda j, carry: self._walk_back(
                slot, rows, row, (whole - 1 - j) * STEPS, STEPS, carry
            ),
            carry,
        )
        return before, carry[0]

    def _walk_back(self, slot: Any, rows: range, row: Any, first: Any, n: int, carry: Any) -> Any:
        """n steps from step `first` on of the group in this row."""
        row = row + first
        return self.steps.walk_back(
            n,
            *carry,
            d_keys=self._d_keys(row, n),
            **self._walked(slot, rows.start + row, row, first, n),
        )

    def _walked(self, slot: Any, t: Any, row: Any, states: Any, n: int) -> dict[str, Any]:
        """What `walk_back` takes for n steps from t on of a chunk, whose scalars and results are
        from `row` on, and whose states from there on; all but `d_keys`."""
        ref = self.ref
        return {
            **self._inputs(slot, t, row, n),
            "q": ref["q_slots"].at[slot, pl.ds(t, n)],
            "states": ref["states"].at[pl.ds(states, STEPS)],
            "d_out": ref["d_out_slots"].at[slot, pl.ds(t, n)],
            "d_v": ref["d_v_rows"].at[pl.ds(row, n)],
            "partial_scalars": ref["partial_scalars"].at[:, pl.ds(row, n)],
        }


def _parity(group: Any) -> Any:
    return lax.bitwise_and(jnp.int32(group), jnp.int32(1))


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    rows = len(chunks.last_rows)
    earlier = x[..., :-1, :].reshape(*x.shape[:4], -1)
    return jnp.concatenate([earlier, x[..., -1, :rows]], axis=-1)
