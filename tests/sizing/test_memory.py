"""The estimate of memory against XLA's own figures."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from harness.config import OptimizerConfig
from harness.optimizer import make_optimizer
from harness.step import init_state, make_train_step

from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import find
from e88_jax.model import E88LM
from e88_jax.sizing import state_bytes, state_per_layer, training_memory
from e88_jax.sizing.memory import _GROUP, KERNEL_MULTIPLE, MAX_KERNEL_SIZE, implementation_on
from pallas_kernels import geometry, support, vjp


def compiled_bytes(config: LMConfig, batch: int, length: int) -> int:
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


@pytest.mark.parametrize(
    ("layer", "model", "batch", "length"),
    [
        ({}, {}, 8, 256),
        ({"dim": 512, "checkpoint_every": 8}, {}, 2, 512),
        ({"n_heads": 4, "n_state": 64, "output_gate": "none"}, {"vocab_size": 4096}, 4, 256),
        (
            {"n_heads": 12, "write_gate": True, "output_norm": True, "value_residual": True},
            {"channel_mixer_dim": 512},
            2,
            256,
        ),
        ({"conv_size": 4, "tie_kv": True, "head_mix": "sum", "decay_mode": "simple"}, {}, 4, 256),
    ],
)
def test_training_memory_is_what_xla_plans(
    layer: dict[str, Any], model: dict[str, Any], batch: int, length: int
) -> None:
    sizes = {"dim": 256, "n_heads": 8, "n_state": 32, "dtype": "float32", **layer}
    config = LMConfig(layer=E88Config(**sizes), depth=2, **model)
    estimate = training_memory(config, batch, length, dtype="float32", implementation="scan")
    assert 0.85 < estimate.total / compiled_bytes(config, batch, length) < 1.15


def test_checkpoints() -> None:
    def of(every: int, **options: Any) -> int:
        layer = E88Config(dim=64, n_heads=3, n_state=16, expansion=2.0, checkpoint_every=every)
        return training_memory(LMConfig(layer=layer, depth=5), 2, 100, **options).checkpoints

    state = 5 * 2 * 3 * 16 * 32
    assert of(32, dtype="float32", implementation="scan") == 4 * state * 4
    assert of(32) == of(1) == 2 * state * 13  # bfloat16, every 8 steps
    assert of(64) == 2 * state * 2
    assert of(64, dtype="float32") == 4 * state * 2


def test_the_kernels_are_as_assumed() -> None:
    assert geometry.GROUP == _GROUP
    assert vjp.KEEPS_GROUPS == 32
    assert (support.SIZE_MULTIPLE, support.MAX_SIZE) == (KERNEL_MULTIPLE, MAX_KERNEL_SIZE)


def test_who_runs_the_recurrence() -> None:
    fits, odd = (E88Config(dim=64, n_heads=2, n_state=n) for n in (32, 30))
    assert implementation_on(None, fits) == implementation_on(find("h100"), fits) == "mosaic_gpu"
    assert implementation_on(find("rtx4090"), fits) == implementation_on(None, odd) == "scan"


def test_state() -> None:
    layer = E88Config(dim=64, n_heads=3, n_state=16, expansion=2.0)
    assert state_per_layer(layer) == 3 * 16 * 32
    assert state_bytes(LMConfig(layer=layer, depth=5)) == 5 * 3 * 16 * 32 * 4
    assert state_bytes(LMConfig(layer=layer, depth=5), "bfloat16") == 5 * 3 * 16 * 32 * 2
    with pytest.raises(ValueError, match="'int8'"):
        state_bytes(LMConfig(layer=layer, depth=5), "int8")


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (5, -1)])
def test_nothing_to_train_on(batch: int, length: int) -> None:
    config = LMConfig(layer=E88Config(dim=64, n_heads=2), depth=1)
    with pytest.raises(ValueError, match="at least 1"):
        training_memory(config, batch, length)
