"""Where the time of a training step goes, by a profile of one."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.measure.gpu_profile import ELSE, breakdown, profile
from e88_jax import recurrence
from e88_jax.config import E88Config, LMConfig
from e88_jax.model import E88LM

if refusal := recurrence.unsupported_device():
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)


def test_every_part_takes_time() -> None:
    config = LMConfig(layer=E88Config(dim=512, n_heads=16), depth=1)
    model = E88LM(config, rngs=nnx.Rngs(0))

    @nnx.jit
    def gradient(model: E88LM, tokens: Any) -> Any:
        return nnx.grad(lambda model: jnp.sum(jnp.square(model(tokens)[0])))(model)

    tokens = jnp.zeros((4, 512), jnp.int32)
    jax.block_until_ready(gradient(model, tokens))
    kernels = profile(lambda: jax.block_until_ready(gradient(model, tokens)))
    ms = breakdown(kernels, steps=1)
    assert set(ms) == {
        "recurrence forward", "recurrence backward", "matrix products", ELSE, "idle",
    }  # fmt: skip
    assert all(x > 0 for part, x in ms.items() if part != "idle")
