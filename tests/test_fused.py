"""Layers that are computed by fused kernels, with XLA in the place of what a kernel computes."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import kernels, recurrence
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.naive import rms_ratio
from e88_jax.reference import scan_recurrence
from pallas_kernels import target
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.decode import op as decode_op
from pallas_kernels.qkv_activation import op as activation_op
from tests.reference import layer_by_xla
from tests.reference.configs import E88_OPTIONS, e88_layer, name_of

AFTER_THE_RECURRENCE = {"expansion", "head_mix", "output_norm", "value_residual"}
"""Options of which many tokens meet each alone: kernels come before."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were called."""
    called: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        return call

    def decode_call(config: DecodeConfig) -> Any:
        return functools.partial(recorded("decode_layer", layer_by_xla.decoded), config)

    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "mosaic_gpu", scan_recurrence)
    monkeypatch.setattr(kernels, "_lowering_refusal", lambda *_: None)
    monkeypatch.setattr(activation_op, "_activate", recorded("activate", layer_by_xla.activated))
    monkeypatch.setattr(decode_op, "_call", decode_call)
    with target.use(target.H100):
        yield called


def build(options: dict[str, Any], implementation: Any = None, **more: Any) -> E88Mixer:
    options = {"n_state": 8, "dtype": "float32", "implementation": implementation, **options}
    return E88Mixer(*e88_layer(**options, **more), rngs=nnx.Rngs(0))


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def check(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert rms_ratio(a, b) < 1e-5


@pytest.mark.parametrize(
    "options",
    [x for x in E88_OPTIONS if len(x) < 2 or not x.keys() <= AFTER_THE_RECURRENCE],
    ids=name_of,
)
def test_many_tokens(options: dict[str, Any], calls: list[str]) -> None:
    """Outputs, states and gradients, in which each layer is its own reference without kernels."""
    x, d_y = numbers(2, 7, 10), numbers(7, 2, 10).swapaxes(0, 1)
    results = []
    for implementation in (None, "scan"):
        graphdef, params = nnx.split(build(options, implementation))

        def loss(params: Any, x: Any, graphdef: Any = graphdef) -> Any:
            y, state = nnx.merge(graphdef, params)(x)
            return jnp.sum(y * d_y), (y, state)

        results.append(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))
    check(*results)
    assert calls == ["activate"] * (not options.get("tie_kv"))


@pytest.mark.parametrize("options", E88_OPTIONS, ids=name_of)
def test_a_token(options: dict[str, Any], calls: list[str]) -> None:
    """From a state, by the layer for inference; the reference is the layer as it is trained."""
    mixer, reference = build(options).for_inference(), build(options, "scan")
    x = numbers(2, 8, 10)
    _, state = jax.jit(reference)(x[:, :7])
    check(jax.jit(mixer)(x[:, 7:], state), jax.jit(reference)(x[:, 7:], state))
    beyond_it = {"tie_kv", "conv_size", "value_residual", "output_norm"} & options.keys()
    has_kernel = not beyond_it and options.get("head_mix", "concat") == "concat"
    assert calls == ["decode_layer"] * has_kernel


def test_tokens_that_the_kernel_does_not_take(calls: list[str]) -> None:
    mixer = build({})
    x = numbers(2, 1, 10)
    jax.eval_shape(mixer, x)
    assert calls == []  # it can be differentiated
    mixer = mixer.for_inference()
    run = jax.jit(mixer)
    ids = jnp.zeros((2, 1), jnp.int32)
    np.testing.assert_allclose(run(x, segment_ids=ids)[0], run(x)[0], rtol=1e-5, atol=1e-6)
    assert calls == ["decode_layer"]
    with pytest.raises(ValueError, match="segment_ids"):
        mixer(x, segment_ids=ids[:1])
    with pytest.raises(ValueError, match=r"not 0.*\(0, 1, 10\)"):
        mixer(x[:0])


def test_a_fallback_says_so_once(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    kernels.log_once.cache_clear()
    mixer = build({"n_state": 6})
    for _ in range(2):
        jax.eval_shape(mixer, numbers(2, 7, 10))
    assert calls == []
    (record,) = caplog.records
    assert "N a multiple of 4, got 6" in record.getMessage()


@pytest.mark.parametrize("n_heads", [3, 8])
def test_any_number_of_heads_has_kernels(n_heads: int, calls: list[str]) -> None:
    """Columns of a matmul of several projections are padded to whole loads."""
    mixer = build({"dtype": "bfloat16", "n_heads": n_heads})
    jax.eval_shape(mixer, numbers(2, 7, 10))
    assert calls == ["activate"]
