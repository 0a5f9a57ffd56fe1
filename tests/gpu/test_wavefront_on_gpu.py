"""Chunks of time by the kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import LanguageModel
from e88_jax.mixers.base import Dtype, Remat
from e88_jax.naive import rms_ratio
from pallas_kernels import target
from tests.reference.configs import lm_config

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)


@pytest.mark.parametrize("remat", ["none", "recurrence"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 0.03)])
def test_loss_state_and_gradient(dtype: Dtype, bound: float, remat: Remat) -> None:
    """Rows of documents and lengths, with a state given, give what they do without chunks."""
    sizes: Any = {"dim": 64, "n_heads": 4, "n_state": 32, "depth": 3, "write_gate": True}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (3, 120)), jnp.int32)
    ids = jnp.asarray(np.cumsum(rng.random((3, 120)) < 0.05, axis=1), jnp.int32)
    lengths = jnp.asarray([120, 71, 9], jnp.int32)
    params = nnx.state(LanguageModel(lm_config(**sizes), rngs=nnx.Rngs(0)))

    def results(time_chunks: int) -> Any:
        options: Any = {"dtype": dtype, "implementation": "mosaic_gpu", "remat": remat}
        config = lm_config(**sizes, **options, time_chunks=time_chunks)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))

        def loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params)
            _, state = model(tokens[:, ::-1], lengths=lengths)
            logits, state = model(tokens, state, ids, lengths=lengths)
            live = jnp.arange(120)[None] < lengths[:, None]
            return jnp.mean(jnp.where(live[:, :, None], jnp.sin(logits), 0)), state

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    with jax.default_matmul_precision("highest"):
        ratios = jax.tree.map(rms_ratio, results(6), results(1))
    assert max(jax.tree.leaves(ratios)) < bound, ratios
