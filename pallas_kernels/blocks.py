"""What a block reads and writes in device memory, and how it moves through shared memory.

Time goes by in chunks: while a block works on one, bulk tensor copies bring the next one into the
other slot of a double buffer. All that knows about copies, barriers and alignment is here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import Geometry, Sizes, round_up
from pallas_kernels.layouts import HEADS, KEYS, WARPS

SLOTS = 2
MAX_SHARED_BYTES = 232_448 - 1024
"""Shared memory of a thread block: the most that Hopper gives one, less what barriers may take.
Source: CUDA C++ Programming Guide, technical specifications of compute capability 9.0 (227 KiB)."""
_ALIGNMENT = 1024  # of each ref, by Pallas


class Block(NamedTuple):
    """The heads, columns and keys of one block, with padding."""

    b: Any
    heads: Any
    values: Any
    keys: Any
    head_block: Any
    value_block: Any

    @classmethod
    def from_index(cls, index: Any, sizes: Sizes, geometry: Geometry) -> "Block":
        """Block `index` of those of all rows, columns fastest."""
        index, value_block = _divmod(index, sizes.values // geometry.values)
        b, head_block = _divmod(index, sizes.heads // geometry.heads)
        heads = pl.ds(head_block * geometry.heads, geometry.heads)
        values = pl.ds(value_block * geometry.values, geometry.values)
        # No start is a Python int: JAX 0.12 refuses slices that it can see to pass the array's end,
        # where the copy engine reads zeros.
        keys = pl.ds(jnp.int32(0), sizes.keys)
        return cls(b, heads, values, keys, head_block, value_block)

    def steps(self, ref: Any, axes: tuple[int, ...], t: Any) -> Any:
        """Steps t of an array `[B, T, H, ...]`, or `[B, H, scalars, T]` for HEADS."""
        if axes == HEADS:
            return ref.at[self.b, self.heads, :, t]
        if axes == KEYS:
            return ref.at[self.b, t, self.heads, self.keys]
        return ref.at[self.b, t, self.heads, self.values]


def _divmod(x: Any, y: int) -> tuple[Any, Any]:
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Time in chunks of `size` steps.

    Where they do not divide it, the last chunk begins early enough to be whole, overlaps the one
    before it, and only its last rows are worked on; if there is one chunk only, its first rows.
    Scalars and results do not overlap: theirs are rows 0 and later.
    """

    time: int
    size: int

    @property
    def whole(self) -> int:
        return self.time // self.size

    @property
    def count(self) -> int:
        return -(-self.time // self.size)

    @property
    def last_rows(self) -> range:
        """The rows of the last chunk to work on."""
        left_over = self.time - (self.count - 1) * self.size
        first = self.size - left_over if self.count > 1 else 0
        return range(first, first + left_over)

    def start(self, i: Any) -> Any:
        """The step in row 0 of chunk i."""
        return jnp.minimum(i * self.size, max(self.time - self.size, 0))


class Input(NamedTuple):
    """An array in device memory, `axes` of it, and its double buffer in shared memory."""

    source: Any
    slots: Any
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Inputs that arrive together, chunk by chunk."""

    block: Block
    chunks: Chunks
    inputs: Sequence[Input]
    loaded: Any  # barriers, each of which expects an arrival from each input
    warpgroup: Any  # which one of its thread block this is
    interpret: Any

    def start(self, i: Any, slot: Any) -> None:
        """Starts to load chunk i, if there is one, into a slot that the block no longer reads."""

        @pl.when((i >= 0) & (i < self.chunks.count))
        def _() -> None:
            by_one_warp(lambda: self._start(i, slot), self.warpgroup, self.interpret)

    def _start(self, i: Any, slot: Any) -> None:
        for source, slots, axes in self.inputs:
            if axes == HEADS:  # time is innermost, where a copy begins at 16 bytes
                t = pl.ds(i * self.chunks.size, slots.shape[-1])
            else:
                t = pl.ds(self.chunks.start(i), self.chunks.size)
            plgpu.copy_gmem_to_smem(
                self.block.steps(source, axes, t), slots.at[slot], self._barrier(slot)
            )

    def wait(self, slot: Any) -> None:
        plgpu.barrier_wait(self._barrier(slot))

    def _barrier(self, slot: Any) -> Any:
        return self.loaded.at[self.warpgroup * SLOTS + slot]


def by_one_warp(copies: Callable[[], None], warpgroup: Any, interpret: Any) -> None:
    """Has one warp of a warpgroup start copies: the others would go through the same instructions
    for nothing. In neighbouring warpgroups it is another one, so that no scheduler has them all.
    """
    if interpret is not None:
        copies()
        return

    @plgpu.warp_map
    def _(warp: Any) -> None:
        pl.when(warp == lax.rem(jnp.int32(warpgroup), jnp.int32(WARPS)))(copies)


def scalars_at_once(chunk: int) -> int:
    """Steps of scalars that one copy brings: a copy is a multiple of 128 bytes."""
    return round_up(chunk, 128 // 4)


def start_stores(copies: Sequence[tuple[Any, Any]], warpgroup: Any, interpret: Any) -> None:
    """Starts `(shared, device)` copies of what the block's warps have written.

    Waits for the warps: what any of them read before may be overwritten afterwards.
    """
    plgpu.commit_smem()

    def start() -> None:
        for source, target in copies:
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    by_one_warp(start, warpgroup, interpret)


def wait_for_stores(in_flight: int = 0) -> None:
    """Waits until at most the latest `in_flight` calls of `start_stores` read shared memory.

    The warp that started the copies waits for them, the others at the barrier that Pallas adds.
    """
    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)


def shared_bytes(scratch: dict[str, Any], warpgroups: int) -> int:
    """Bytes that `run_blocks` takes for the scratch of so many warpgroups, barriers left out."""
    sizes = [
        warpgroups * math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in scratch.values()
        if not isinstance(x, plgpu.Barrier)
    ]
    return sum(round_up(size, _ALIGNMENT) for size in sizes)


def run_blocks(
    name: str,
    body: Any,
    n_blocks: int,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    scratch: dict[str, Any],
    *,
    warpgroups: int,
    approximate: bool,
    interpret: Any,
) -> dict[str, Any]:
    """Runs `body(index, warpgroup, refs)` for each block, `warpgroups` of them side by side.

    Blocks that share a thread block have nothing to do with each other, but are scheduled together:
    `warpgroups` caps the registers of a thread at 65536 / (128 warpgroups), and so says how many
    blocks a multiprocessor holds.

    Args:
        name: of the kernel, for profiles.
        body: a function of the number of the block, that of its warpgroup in a thread block, and
            the refs of inputs, outputs and scratch by name.
        scratch: what each block has for itself; of barriers, `SLOTS`.
        approximate: whether tanh may be the instruction of that name.
    """

    def of_all(x: Any) -> Any:
        if isinstance(x, plgpu.Barrier):
            return plgpu.Barrier(num_arrivals=x.num_arrivals, num_barriers=SLOTS * warpgroups)
        return plgpu.SMEM((warpgroups, *x.shape), x.dtype)

    def one_thread(*refs: Any) -> None:
        ref = dict(zip([*inputs, *outputs, *scratch], refs, strict=True))
        warpgroup = lax.axis_index("warpgroup") if warpgroups > 1 else 0
        index = lax.axis_index("block") * warpgroups + warpgroup
        for name, x in scratch.items():
            if not isinstance(x, plgpu.Barrier):
                ref[name] = ref[name].at[warpgroup]

        @pl.when(index < n_blocks)
        def _() -> None:
            body(index, warpgroup, ref)

    one_thread.__name__ = one_thread.__qualname__ = name
    threads = {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    results = plgpu.kernel(
        one_thread,
        out_type=list(outputs.values()),
        scratch_types=[of_all(x) for x in scratch.values()],
        grid=(-(-n_blocks // warpgroups),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **threads,
        **({} if interpret is None else {"interpret": interpret}),
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
