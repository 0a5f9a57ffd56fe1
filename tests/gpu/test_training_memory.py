"""The estimate of training memory against XLA's plan for the GPU at hand; nothing is run."""

import dataclasses
from typing import Any

import pytest

from benchmarks import plan
from e88_jax.mixers.base import Execution
from e88_jax.sizing import PRESETS, training_memory
from pallas_kernels import target

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)


@pytest.mark.parametrize("remat", ["none", "recurrence", "layer"])
@pytest.mark.parametrize(
    ("preset", "batch", "length"),
    [("h72n32-500m", 8, 2048), ("h72n32-500m", 1, 16384), ("h40n64-500m", 8, 2048)],
)
def test_training_memory_is_what_xla_plans(
    preset: str, batch: int, length: int, remat: Any
) -> None:
    execution = Execution(remat=remat)
    config = dataclasses.replace(PRESETS[preset].config, depth=4, execution=execution)
    compiled = plan.lower_step(plan.on_a_gpu(config), batch, length).compile()
    estimate = training_memory(config, batch, length)
    assert 0.85 < estimate.total / plan.planned_bytes(compiled) < 1.15
