"""Attention by cuDNN against XLA's, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import kernels
from e88_jax.mixers.base import Execution, Implementation
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
    config: AttentionConfig, time: int, implementation: Implementation | None, **options: Any
) -> Any:
    """Output, loss and gradients, and the program's text."""
    execution = Execution(dtype="bfloat16", implementation=implementation)
    mixer = config.build(DIM, execution, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(3, time, DIM)), jnp.float32) for _ in range(2))

    def loss(params: Any, x: Any) -> Any:
        y, _ = nnx.merge(graphdef, params)(x, **options)
        return jnp.sum(weights * y.astype(jnp.float32)), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = run.lower(params, x).compile()
    (_, y), gradient = compiled(params, x)
    return jax.tree.map(np.asarray, (y, gradient)), compiled.as_text()


@pytest.mark.parametrize("time", [2, 31, 64, 515])
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_cudnn_equals_xla(
    config: AttentionConfig, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[Any] = []
    monkeypatch.setattr(kernels, "log_fallback", lambda *refusal: refusals.append(refusal))
    actual, program = results(config, time, None)
    assert not refusals
    assert "fmha" in program
    expected, program = results(config, time, "scan")
    assert "fmha" not in program
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(b, np.float64)) > 0 or time == 1
        assert rms_ratio(a, b) < 2e-2


@pytest.mark.parametrize("head_dim", [36, 136])
def test_heads_that_cudnn_does_not_take(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: list[Any] = []
    monkeypatch.setattr(kernels, "log_fallback", lambda *refusal: refusals.append(str(refusal)))
    _, program = results(AttentionConfig(n_heads=2, head_dim=head_dim), 31, None)
    assert "fmha" not in program
    assert f"multiple of 8 and at most 128, got {head_dim}" in refusals[0]
