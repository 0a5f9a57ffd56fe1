"""The backward kernel: each block replays its columns and carries their gradient back in time.

Segments, of the steps between two checkpoints, go by from last to first. In each, the steps are
first replayed in order, to leave the state before each group of `history` steps in device memory (a
few states per head, whatever T is). Then, from last to first, a group is replayed again with every
state kept in shared memory, and walked back.
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
    d_scalars = value_blocks, batch, n_heads // heads, chunks.count, 1 + x.has_write_gate
    outputs = {
        "d_q": d_keys,
        "d_k": d_keys,
        "d_v": jax.ShapeDtypeStruct((batch, x.time, n_heads, n_values), dtype),
        "d_scalars": jax.ShapeDtypeStruct((*d_scalars, size, heads), jnp.float32),
        "d_initial_state": jax.ShapeDtypeStruct((batch, n_heads, n_values, keys), jnp.float32),
        # The state before each group of a segment: not a result.
        "replayed": jax.ShapeDtypeStruct(
            (n_blocks, checkpoint_every // geometry.history, heads, values, keys), dtype
        ),
    }

    def body(index: Any, warpgroup: Any, ref: dict[str, Any]) -> None:
        block = Block.from_index(index, n_heads, n_values, heads, values)
        segment_chunks = checkpoint_every // size
        way = _WayBack(
            ref, index, block, chunks, segment_chunks, geometry.history, steps, warpgroup, interpret
        )
        way.go()

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


@dataclasses.dataclass(frozen=True)
class _WayBack:
    """A block's way back in time: segments, of whole chunks, of groups of `history` steps.

    "Rows" are steps of a chunk: all, or those of the last chunk that are to be worked on. `c` is
    the number of a chunk in its segment.
    """

    ref: dict[str, Any]
    index: Any
    block: Block
    chunks: Chunks
    segment_chunks: int
    history: int
    steps: Steps
    warpgroup: Any
    interpret: Any

    @property
    def _dtype(self) -> Any:
        return self.ref["states"].dtype

    @property
    def _groups(self) -> int:
        """Of a chunk."""
        return self.chunks.size // self.history

    @property
    def _replays_first(self) -> bool:
        """To know the state before each group."""
        return self.segment_chunks * self._groups > 1

    def _stream(self, name: str, inputs: dict[str, tuple[int, ...]]) -> Stream:
        ref = self.ref
        return Stream(
            self.block,
            self.chunks,
            [Input(ref[x], ref[f"{name}_{x}"], axes) for x, axes in inputs.items()],
            ref[f"{name}_loaded"],
            self.warpgroup,
            self.interpret,
        )

    @property
    def _replay_stream(self) -> Stream:
        return self._stream("replay", {"k": KEYS, "errors": VALUES, "scalars": HEADS})

    @property
    def _back_stream(self) -> Stream:
        axes = {"k": KEYS, "q": KEYS, "errors": VALUES, "d_out": VALUES, "scalars": HEADS}
        return self._stream("back", axes)

    def go(self) -> None:
        ref, block, chunks = self.ref, self.block, self.chunks
        zero = jnp.int32(0)
        n = zero, zero
        n_segments = -(-chunks.count // self.segment_chunks)
        last_start = (n_segments - 1) * self.segment_chunks
        last_count = chunks.count - last_start
        if self._replays_first:
            self._replay_stream.start(jnp.int32(last_start), zero)
        self._back_stream.start(jnp.int32(chunks.count - 1), zero)
        d_state = self.steps.load(ref["d_final_state"].at[block.b, block.heads, block.values])
        n_alike = n_segments
        if chunks.whole < chunks.count or last_count < self.segment_chunks:
            n_alike -= 1
            last_rows = chunks.last_rows
            n, d_state = self._segment(jnp.int32(n_alike), n, d_state, last_count, last_rows)
        if n_alike:
            rows = range(chunks.size)
            _, d_state = lax.fori_loop(
                0,
                n_alike,
                lambda j, carry: self._segment(
                    n_alike - 1 - j, carry[0], carry[1], self.segment_chunks, rows
                ),
                (n, d_state),
            )
        target = ref["d_initial_state"].at[block.b, block.heads, block.values]
        self.steps.store(target, d_state)
        wait_for_stores()

    def _segment(self, s: Any, n: Any, d_state: Array, count: int, last_rows: range) -> Any:
        """The gradient of segment s, of `count` chunks, of which the last has these rows.

        n counts the chunks that came in each stream.
        """
        rows, block = range(self.chunks.size), self.block
        base = s * self.segment_chunks
        n_replay, n_back = n
        checkpoint = self.ref["checkpoints"].at[block.b, block.heads, s, block.values]
        state = self.steps.load(checkpoint).astype(jnp.float32)

        def next_back(j: Any, carry: Any, rows: range) -> Any:
            n, carry = carry
            c = count - 1 - j
            return n + 1, self._chunk_back(n, base + c, c, rows, carry)

        if self._replays_first:
            carry = lax.fori_loop(
                0,
                count - 1,
                lambda c, carry: self._replay_chunk(c, base + c + 1, rows, carry),
                (n_replay, state),
            )
            n_replay, state = self._replay_chunk(
                count - 1, base - self.segment_chunks, last_rows, carry, is_last=True
            )
        carry, first = (n_back, (state.astype(self._dtype), d_state)), 0
        if len(last_rows) < self.chunks.size:
            carry, first = next_back(0, carry, last_rows), 1
        n_back, (_, d_state) = lax.fori_loop(
            first, count, lambda j, carry: next_back(j, carry, rows), carry
        )
        return (n_replay, n_back), d_state

    def _state_before(self, g: Any) -> Any:
        """The state before group g of the segment."""
        return self.ref["replayed"].at[self.index, g]

    def _replay_chunk(
        self, c: Any, following: Any, rows: range, carry: Any, is_last: bool = False
    ) -> Any:
        """Rows of chunk c; of the last one of a segment not the last group, as the state after it
        is not wanted. `following` is the chunk to be replayed next, as a number of all chunks."""
        n, state = carry
        slot = lax.rem(n, SLOTS)
        self._replay_stream.start(following, 1 - slot)
        self._replay_stream.wait(slot)

        def group(g: Any, state: Array) -> Array:
            before = self._state_before(c * self._groups + g)
            self.steps.store(before, state.astype(self._dtype))
            t = rows.start + g * self.history
            inputs = self._inputs("replay", slot, t, g * self.history, self.history)
            return self.steps.replay(self.history, state, **inputs)

        state = lax.fori_loop(0, -(-len(rows) // self.history) - is_last, group, state)
        synchronize(self.interpret)  # every warp has read the slot
        return n + 1, state

    def _inputs(self, stream: str, slot: Any, t: Any, row: Any, n: int) -> dict[str, Any]:
        """What is replayed: n steps from t on of a chunk, whose scalars are from `row` on."""
        ref = self.ref
        return {
            "k": ref[f"{stream}_k"].at[slot, pl.ds(t, n)],
            "errors": ref[f"{stream}_errors"].at[slot, pl.ds(t, n)],
            "scalars": ref[f"{stream}_scalars"].at[slot, :, :, pl.ds(row, n)],
        }

    def _chunk_back(self, n: Any, i: Any, c: Any, rows: range, carry: Any) -> Any:
        """Rows of chunk i, chunk c of its segment.

        Carries the state before the group at hand and the gradient of the state after it.
        """
        ref, block = self.ref, self.block
        slot = lax.rem(n, SLOTS)
        self._back_stream.start(i - 1, 1 - slot)
        self._back_stream.wait(slot)
        wait_for_stores()
        whole, left_over = divmod(len(rows), self.history)
        if left_over:
            carry = self._group_back(slot, c, rows, whole, left_over, carry)
        carry = lax.fori_loop(
            0,
            whole,
            lambda j, carry: self._group_back(slot, c, rows, whole - 1 - j, self.history, carry),
            carry,
        )
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
        return carry

    def _group_back(self, slot: Any, c: Any, rows: range, g: Any, n: int, carry: Any) -> Any:
        """The n steps of group g of these rows."""
        start, d = carry
        row = g * self.history
        after = self.steps.replay(
            n,
            start.astype(jnp.float32),
            **self._inputs("back", slot, rows.start + row, row, n),
            states=self.ref["states"].at[pl.ds(0, n)],
        )
        if self._replays_first:
            # Loaded a group ahead, as it comes from device memory.
            previous = jnp.maximum(c * self._groups + g - 1, 0)
            start = self.steps.load(self._state_before(previous))
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
        return start, carry[0]

    def _walk_back(self, slot: Any, rows: range, row: Any, first: Any, n: int, carry: Any) -> Any:
        """n steps from step `first` on of the group in this row."""
        ref, row = self.ref, row + first
        t = rows.start + row
        return self.steps.walk_back(
            n,
            *carry,
            **self._inputs("back", slot, t, row, n),
            q=ref["back_q"].at[slot, pl.ds(t, n)],
            states=ref["states"].at[pl.ds(first, STEPS)],
            d_out=ref["back_d_out"].at[slot, pl.ds(t, n)],
            d_v=ref["d_v_rows"].at[pl.ds(row, n)],
            d_keys=ref["d_keys_rows"].at[:, pl.ds(row, n)],
            partial_scalars=ref["partial_scalars"].at[:, pl.ds(row, n)],
        )


def _in_time(d_scalars: Array, chunks: Chunks) -> Array:
    """From `[P, B, H / heads, chunks, S, size, heads]` to `[P, B, H, S, T]`."""
    x = jnp.moveaxis(d_scalars, 6, 3)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [P, B, H, chunks, S, size]
    x = jnp.moveaxis(x, 3, 4)
    rows = len(chunks.last_rows)
    earlier = x[..., :-1, :].reshape(*x.shape[:4], -1)
    return jnp.concatenate([earlier, x[..., -1, :rows]], axis=-1)
