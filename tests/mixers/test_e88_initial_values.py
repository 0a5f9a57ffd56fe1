"""The distributions that new parameters are drawn from."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.mixers.e88 import E88Mixer
from e88_jax.projection import InputProjections
from tests.reference.configs import E88_OPTIONS, e88_layer

OPTIONS: dict[str, Any] = {
    "dim": 64,
    "n_heads": 40,
    "n_state": 8,
    "expansion": 2.0,
    "write_gate": True,
    "conv_size": 4,
    "output_norm": True,
    "value_residual": True,
    "dtype": "float32",
}
LAYER = e88_layer(**OPTIONS)


@pytest.fixture(scope="module")
def mixer() -> E88Mixer:
    return E88Mixer(*LAYER, rngs=nnx.Rngs(0))


def build(**changes: Any) -> E88Mixer:
    """A layer of one option and as little else as can be."""
    minimal = {"write_gate": False, "conv_size": None, "decay_mode": "none"}
    return E88Mixer(*e88_layer(**OPTIONS | minimal | changes), rngs=nnx.Rngs(0))


def array(param: Any) -> np.ndarray:
    return np.asarray(param[...])


def check_uniform(x: Any, bound: float) -> None:
    """x is uniform in +-bound, as far as its size can tell."""
    x = np.asarray(x)
    assert np.max(np.abs(x)) <= bound * (1 + 1e-6)
    assert np.max(np.abs(x)) > bound * (1 - 10 / x.size)
    # Five standard errors of the mean and of the mean square of a uniform distribution.
    assert abs(np.mean(x)) < 5 * bound / np.sqrt(3 * x.size)
    assert abs(np.mean(x**2) / bound**2 - 1 / 3) < 5 * np.sqrt(4 / 45 / x.size)


def check_xavier(projection: Any, n_in: int, n_out: int) -> None:
    check_uniform(array(projection.kernel), np.sqrt(6 / (n_in + n_out)))


def test_projections_are_xavier_uniform(mixer: E88Mixer) -> None:
    dim, heads, keys, values = 64, 40, 320, 640
    inputs = mixer.inputs
    assert isinstance(inputs, InputProjections)
    fused = np.sqrt(6 / (dim + 2 * keys + values))
    qkv = array(inputs.qkv.kernel)
    assert qkv.shape == (dim, heads, 8 + 8 + 16)
    check_uniform(qkv, fused)
    for part in np.split(qkv, [8, 16], axis=2):
        check_uniform(part, fused)
    check_xavier(inputs.gate, dim, values)
    check_xavier(inputs.decay, dim, heads)
    check_xavier(mixer.heads.projection, values, dim)


def test_projections_of_options_are_xavier_uniform() -> None:
    dim, heads, keys = 64, 40, 320
    tied = build(tie_kv=True, expansion=1.0).inputs
    assert isinstance(tied, InputProjections)
    for part in np.split(array(tied.qkv.kernel), 2, axis=2):
        check_uniform(part, np.sqrt(6 / (dim + keys)))
    per_head = build(head_mix="per_head").heads.projection
    assert per_head.kernel.shape == (heads, 16, dim)
    check_xavier(per_head, 16, dim)
    other = build(head_mix="input_weighted", decay_mode="simple")
    assert isinstance(other.inputs, InputProjections)
    check_xavier(other.heads.projection, 16, dim)
    check_xavier(other.inputs.head_weights, dim, heads)
    check_xavier(other.inputs.decay, dim, heads)


def test_framework_defaults(mixer: E88Mixer) -> None:
    """PyTorch's for Linear and Conv1d: uniform in +-1 / sqrt(fan_in)."""
    assert isinstance(mixer.inputs, InputProjections)
    assert mixer.inputs.write_gate is not None
    check_uniform(array(mixer.inputs.write_gate.kernel), 1 / np.sqrt(64))
    assert mixer.conv is not None
    taps = array(mixer.conv.taps)
    assert taps.shape == (4, 40, 8 + 8 + 16)
    for part in np.split(taps, [8, 16], axis=2):
        check_uniform(part, 1 / np.sqrt(4))


def test_decay(mixer: E88Mixer) -> None:
    many = build(n_heads=4000, dim=1, decay_mode="mamba")
    for some in (mixer, many):
        A_log, dt_bias = array(some.decay.A_log), array(some.decay.dt_bias)
        chex.assert_tree_all_finite((A_log, dt_bias))
        dt = np.log1p(np.exp(dt_bias.astype(np.float64)))
        assert np.min(A_log) >= 0
        assert np.max(A_log) <= np.log(16) + 1e-6
        assert np.min(dt) >= 1e-3 * (1 - 1e-4)
        assert np.max(dt) <= 1e-1 * (1 + 1e-4)
    # A is uniform, dt log-uniform: halves of the range hold halves of the heads.
    assert abs(np.mean(np.exp(A_log)) - 8.5) < 0.4
    assert abs(np.mean(np.log10(dt)) + 2) < 0.06
    assert np.max(dt) > 0.098  # of the whole range, which is up to 0.1


def test_constants(mixer: E88Mixer) -> None:
    np.testing.assert_array_equal(array(mixer.heads.value_residual), np.ones((40, 16)))
    norm = mixer.heads.norm
    assert norm is not None
    np.testing.assert_array_equal(array(norm.scale), np.ones(16))
    other = build(head_mix="weighted_sum", decay_mode="constant")
    np.testing.assert_array_equal(array(other.decay.logit), np.full(40, 4.0))
    np.testing.assert_allclose(array(other.heads.weights), np.full(40, 1 / 40), rtol=1e-6)


def test_seeds(mixer: E88Mixer) -> None:
    same, other = (E88Mixer(*LAYER, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    chex.assert_trees_all_equal(nnx.state(mixer), nnx.state(same))
    first, second = (dict(nnx.to_flat_state(nnx.state(x))) for x in (mixer, other))
    for path in (("decay", "A_log"), ("inputs", "qkv", "kernel")):
        assert not np.array_equal(array(first[path]), array(second[path]))


def test_parameters_are_float32_and_unbiased() -> None:
    """Whatever the dtype of the matmuls."""
    for options in E88_OPTIONS:
        layer = e88_layer(**options, dtype="bfloat16")
        mixer = nnx.eval_shape(lambda layer=layer: E88Mixer(*layer, rngs=nnx.Rngs(0)))
        for path, param in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
            assert param.dtype == jnp.float32
            assert path[-1] != "bias"
