"""The estimate of training memory against XLA's plan for the GPU at hand; nothing is run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from harness.config import OptimizerConfig
from harness.optimizer import make_optimizer
from harness.step import init_state, make_train_step

from e88_jax import recurrence
from e88_jax.config import LMConfig
from e88_jax.model import E88LM
from e88_jax.sizing import PRESETS, training_memory

if refusal := recurrence._unsupported_device():
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)


def planned_bytes(config: LMConfig, batch: int, length: int) -> int:
    """Arguments and working memory of the compiled training step."""
    optimizer = make_optimizer(OptimizerConfig(), steps=100)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: E88LM(config, rngs=nnx.Rngs(0))))
    state = jax.eval_shape(
        lambda: init_state(E88LM(config, rngs=nnx.Rngs(0)), optimizer, carry_shape=None)
    )
    windows = jax.ShapeDtypeStruct((1, batch, length + 1), jnp.uint8)
    step = jax.jit(make_train_step(graphdef, optimizer, clip_norm=1.0), donate_argnums=0)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        compiled = step.lower(state, windows, jax.ShapeDtypeStruct((), bool)).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "recurrence", "layer"])
@pytest.mark.parametrize(
    ("preset", "batch", "length"),
    [("h72n32-500m", 8, 2048), ("h72n32-500m", 1, 16384), ("h40n64-500m", 8, 2048)],
)
def test_training_memory_is_what_xla_plans(
    preset: str, batch: int, length: int, remat: Any
) -> None:
    config = dataclasses.replace(PRESETS[preset].config, depth=4, remat=remat)
    estimate = training_memory(config, batch, length)
    assert 0.85 < estimate.total / planned_bytes(config, batch, length) < 1.15
