"""The launch of a kernel of independent blocks, one warpgroup each."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Index, Interpret, Ref, Scratch
from pallas_kernels.common.copies import SLOTS
from pallas_kernels.common.sizes import round_up
from pallas_kernels.target import H100, Target

_BARRIER_BYTES = 1024
"""Shared memory left to the mbarriers of bulk copies."""
_ALIGNMENT = 1024
"""Bytes; Pallas aligns each reference in shared memory to it."""
_RESERVED = 1024
"""Bytes of an SM's shared memory that the driver keeps of each thread block. Source: CUDA C++
Programming Guide, shared memory of compute capability 8.x and 9.0."""


def shared_memory_limit(target: Target) -> int:
    """Bytes of shared memory for the scratch of a thread block; the H100's where unknown."""
    return _per_block(target) - _of_barriers(target)


def thread_blocks(scratch_bytes: int, target: Target) -> int:
    """Thread blocks with so much scratch that the shared memory of an SM holds."""
    per_sm = _per_block(target) + _RESERVED
    return per_sm // (scratch_bytes + _of_barriers(target) + _RESERVED)


def _per_block(target: Target) -> int:
    per_block = target.shared_memory_per_block or H100.shared_memory_per_block
    assert per_block is not None
    return per_block


def _of_barriers(target: Target) -> int:
    return _BARRIER_BYTES if target.uses_bulk_copies else 0


def shared_bytes(scratch: Scratch, warpgroups: int) -> int:
    """Bytes that `run_blocks` takes for the scratch of a thread block, mbarriers left out."""
    sizes = [
        warpgroups * math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in scratch.values()
        if not isinstance(x, plgpu.Barrier)
    ]
    return sum(round_up(size, _ALIGNMENT) for size in sizes)


def run_blocks(
    name: str,
    body: Callable[[Index, Index, dict[str, Ref]], None],
    n_blocks: int,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: Scratch,
    *,
    warpgroups: int,
    approximate: bool,
    interpret: Interpret,
) -> dict[str, Array]:
    """Runs `body(index, warpgroup, refs)` for each block, `warpgroups` of them in a thread block.

    Blocks of a thread block share nothing but their schedule: `warpgroups` caps the registers of a
    thread at 65536 / (128 warpgroups), and so sets how many blocks an SM holds.

    Args:
        name: name of the kernel in profiles.
        body: takes the number of the block, that of its warpgroup in the thread block, and the refs
            of inputs, outputs and scratch by name.
        scratch: shared memory of one block; of mbarriers each block gets `SLOTS`.
        approximate: whether tanh may be `tanh.approx`.
    """

    def of_thread_block(x: Any) -> Any:
        if isinstance(x, plgpu.Barrier):
            return plgpu.Barrier(num_arrivals=x.num_arrivals, num_barriers=SLOTS * warpgroups)
        return plgpu.SMEM((warpgroups, *x.shape), x.dtype)

    def one_thread(*refs: Ref) -> None:
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
    options: dict[str, Any] = {} if interpret is None else {"interpret": interpret}
    threads = {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    results = plgpu.kernel(
        one_thread,
        out_type=list(outputs.values()),
        scratch_types=[of_thread_block(x) for x in scratch.values()],
        grid=(-(-n_blocks // warpgroups),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **threads,
        **options,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
