"""Attention by cuDNN against XLA's, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import kernels
from e88_jax.mixers.base import Dtype, Execution, Implementation
from e88_jax.mixers.baselines import AttentionConfig
from e88_jax.naive import rms_ratio

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

DIM = 96
LAYERS = [
    AttentionConfig(n_heads=4, head_dim=64),
    AttentionConfig(n_heads=6, head_dim=8, n_kv_heads=2),
    AttentionConfig(n_heads=3, head_dim=40, n_kv_heads=1, window=7),
    AttentionConfig(n_heads=2, head_dim=128, window=64, qk_norm=False),
    AttentionConfig(n_heads=2, head_dim=16, window=1),
]


def results(
    config: AttentionConfig,
    time: int,
    implementation: Implementation | None,
    dtype: Dtype = "bfloat16",
) -> Any:
    """Output and gradients, and the program's text."""
    execution = Execution(dtype=dtype, implementation=implementation)
    mixer = config.build(DIM, execution, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(3, time, DIM)), jnp.float32) for _ in range(2))

    def loss(params: Any, x: Any) -> Any:
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.sum(weights * y.astype(jnp.float32)), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = run.lower(params, x).compile()
    (_, y), gradient = compiled(params, x)
    arrays = [np.asarray(a, np.float64) for a in jax.tree.leaves((y, gradient))]
    return arrays, str(compiled.as_text())


@pytest.mark.parametrize("time", [2, 31, 64, 515])
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_cudnn_equals_xla(
    config: AttentionConfig, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[Any] = []
    monkeypatch.setattr(kernels, "log_fallback", lambda *refusal: refusals.append(refusal))
    actual, program = results(config, time, None)
    assert not refusals
    assert "fmha" in program  # the name of cuDNN's custom call
    by_xla, program = results(config, time, "scan")
    assert "fmha" not in program
    exact, _ = results(config, time, "scan", "float32")
    scale = max(map(np.linalg.norm, exact))
    for a, b, expected in zip(actual, by_xla, exact, strict=True):
        error, error_of_xla = np.linalg.norm(a - expected), np.linalg.norm(b - expected)
        assert error < 2 * error_of_xla + 1e-3 * scale
    assert rms_ratio(actual[0], exact[0]) < 1e-2


@pytest.mark.parametrize("head_dim", [36, 136])
def test_heads_that_cudnn_does_not_take(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: list[Any] = []
    monkeypatch.setattr(kernels, "log_fallback", lambda *refusal: refusals.append(str(refusal)))
    _, program = results(AttentionConfig(n_heads=2, head_dim=head_dim), 31, None)
    assert "fmha" not in program
    assert f"multiple of 8 and at most 128, got {head_dim}" in refusals[0]
