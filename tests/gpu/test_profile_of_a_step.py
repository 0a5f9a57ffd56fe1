"""Where the time of a training step goes, by a profile of one."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.measure.gpu_profile import COMMUNICATION, ELSE, breakdown, profile
from e88_jax.model import LanguageModel
from pallas_kernels import target
from tests.reference.configs import lm_config

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)


def test_every_part_takes_time() -> None:
    config = lm_config(dim=512, n_heads=16, n_state=32)
    model = LanguageModel(config, rngs=nnx.Rngs(0))

    @nnx.jit
    def gradient(model: LanguageModel, tokens: Any) -> Any:
        return nnx.grad(lambda model: jnp.sum(jnp.square(model(tokens)[0])))(model)

    tokens = jnp.zeros((4, 512), jnp.int32)
    jax.block_until_ready(gradient(model, tokens))
    kernels = profile(lambda: jax.block_until_ready(gradient(model, tokens)))
    ms = breakdown(kernels, steps=1)
    assert ms.pop(COMMUNICATION) == 0  # there is one GPU in it
    assert set(ms) == {
        "recurrence forward", "recurrence backward", "matmuls", ELSE, "idle",
    }  # fmt: skip
    assert all(x > 0 for part, x in ms.items() if part != "idle")
