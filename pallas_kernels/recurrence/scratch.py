"""Shared memory of a block of the recurrence's kernels, by name."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Scratch
from pallas_kernels.common.copies import SLOTS
from pallas_kernels.common.sizes import LANES, WARPS
from pallas_kernels.limits import SAVED_STATE_GROUP
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS
from pallas_kernels.recurrence.tuning_config import TuningConfig


def forward_scratch(
    config: TuningConfig, keys: int, n_scalars: int, dtype: Any, save_delta: bool
) -> Scratch:
    """Shared memory of a block of the forward kernel."""
    heads, values, chunk = config.heads, config.values, config.chunk
    memory: Scratch = {
        "q_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "k_slots": plgpu.SMEM((SLOTS, chunk, heads, keys), dtype),
        "v_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, config.scalar_steps), jnp.float32),
        "out_slots": plgpu.SMEM((config.result_slots, chunk, heads, values), dtype),
        **_loaded(config, inputs=4),
    }
    if save_delta:
        memory["delta_slots"] = plgpu.SMEM((config.result_slots, chunk, heads, values), jnp.float32)
    return memory


def backward_scratch(
    config: TuningConfig, keys: int, n_scalars: int, has_write_gate: bool, dtype: Any
) -> Scratch:
    """Shared memory of a block of the backward kernel."""
    heads, values, chunk = config.heads, config.values, config.chunk
    keys_slots = plgpu.SMEM((SLOTS, chunk, heads, keys), dtype)
    if config.in_place:
        # Axis 0: q, k, and then their gradients; those of v lie in `d_out_slots`.
        slots: Scratch = {"keys_slots": plgpu.SMEM((2, *keys_slots.shape), dtype)}
        results: Scratch = {}
        partial_sums = 1
    else:
        slots = {"k_slots": keys_slots, "q_slots": keys_slots}
        # Axis 0: gradients of q, of k. Rows past the chunk are never read.
        past = MMA_STEPS * config.pipelined
        results = {
            "d_keys_rows": plgpu.SMEM((2, chunk + past, heads, keys), dtype),
            "d_v_rows": plgpu.SMEM((chunk, heads, values), dtype),
        }
        partial_sums = 4
    pipelined: Scratch = {}
    if config.pipelined:
        # Accumulators of each half of a group, by warp: tiles of 16 keys, lanes, 4 of a lane.
        of_half = WARPS, keys // 16, LANES, 4
        pipelined["sums"] = plgpu.SMEM((SAVED_STATE_GROUP // MMA_STEPS, *of_half), jnp.float32)
    return {
        **slots,
        "delta_slots": plgpu.SMEM((SLOTS, chunk, heads, values), jnp.float32),
        "d_out_slots": plgpu.SMEM((SLOTS, chunk, heads, values), dtype),
        "scalars_slots": plgpu.SMEM((SLOTS, heads, n_scalars, config.scalar_steps), jnp.float32),
        **_loaded(config, inputs=5),
        "states": plgpu.SMEM(
            ((1 + config.pipelined) * config.states_held, heads, values, keys), dtype
        ),
        **results,
        "partial_scalars": plgpu.SMEM(
            (1 + has_write_gate, chunk, WARPS, partial_sums), jnp.float32
        ),
        **pipelined,
    }


def _loaded(config: TuningConfig, inputs: int) -> Scratch:
    """The mbarriers at which inputs arrive, if bulk copies bring them."""
    return {"loaded": plgpu.Barrier(num_arrivals=inputs)} if config.copies == "bulk" else {}
