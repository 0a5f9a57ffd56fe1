from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.interop import mixer_from_torch, mixer_to_torch
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.projection import InputProjections
from tests.reference import layer as numpy_layer
from tests.reference.configs import E88_OPTIONS, E88Layer, e88_layer, name_of

LAYER = e88_layer(conv_size=3, head_mix="per_head", dtype="float32")
SHAPES = numpy_layer.torch_shapes(LAYER.config, LAYER.dim)


def random_weights(layer: E88Layer = LAYER) -> dict[str, np.ndarray]:
    return numpy_layer.random_weights(layer.config, layer.dim)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return random_weights()


# That the numbers mean the same is tested with the layer, from the same weights
# (mixers/test_e88.py).


@pytest.mark.parametrize("options", E88_OPTIONS, ids=name_of)
def test_round_trip_from_torch(options: dict[str, Any]) -> None:
    layer = e88_layer(**options, dtype="float32")
    weights = random_weights(layer)
    mixer = mixer_from_torch(weights, *layer)
    assert (mixer.config, mixer.dim, mixer.execution) == layer
    chex.assert_trees_all_equal(mixer_to_torch(mixer), weights)


def test_round_trip_to_torch() -> None:
    mixer = E88Mixer(*LAYER, rngs=nnx.Rngs(0))
    again = mixer_from_torch(mixer_to_torch(mixer), *LAYER)
    assert nnx.graphdef(mixer) == nnx.graphdef(again)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(mixer))


def test_layouts(weights: dict[str, np.ndarray]) -> None:
    mixer = mixer_from_torch(weights, *LAYER)
    assert isinstance(mixer.inputs, InputProjections)
    qkv, heads, n = np.asarray(mixer.inputs.qkv.kernel[...]), 3, 4
    rows = weights["qkv_proj.weight"]
    np.testing.assert_array_equal(qkv[:, 1, 1], rows[n + 1])  # q of head 1
    np.testing.assert_array_equal(qkv[:, 2, n + 3], rows[heads * n + 2 * n + 3])  # k of head 2
    np.testing.assert_array_equal(qkv[:, 1, 2 * n], rows[2 * heads * n + n])  # v of head 1
    assert mixer.conv is not None
    taps = mixer.conv.taps[...]
    np.testing.assert_array_equal(taps[:, 0, 2 * n + 2], weights["v_conv.weight"][2, 0])
    np.testing.assert_array_equal(taps[:, 2, n + 1], weights["k_conv.weight"][2 * n + 1, 0])
    np.testing.assert_array_equal(
        mixer.heads.projection.kernel[...][1], weights["head_projs.1.weight"].T
    )


def test_the_result_is_an_ordinary_layer(weights: dict[str, np.ndarray]) -> None:
    """Concrete float32 parameters that no caller's array shares, ready to train."""
    mixer = mixer_from_torch(weights, *LAYER)
    ordinary = nnx.eval_shape(lambda: E88Mixer(*LAYER, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(mixer) == nnx.graphdef(ordinary)
    for leaf in jax.tree.leaves(nnx.state(mixer)):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.float32
    before = np.array(mixer.decay.A_log[...])
    weights["A_log"][:] = 0
    np.testing.assert_array_equal(mixer.decay.A_log[...], before)
    exported = mixer_to_torch(mixer)
    for array in exported.values():
        assert array.flags.owndata
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_any_float_becomes_float32(weights: dict[str, np.ndarray], dtype: str) -> None:
    given = {key: x.astype(jnp.dtype(dtype)) for key, x in weights.items()}
    mixer = mixer_from_torch(given, *LAYER)
    expected = {key: x.astype(np.float32) for key, x in given.items()}
    chex.assert_trees_all_equal(mixer_to_torch(mixer), expected)


class TestErrors:
    def error(self, weights: dict[str, Any], layer: E88Layer = LAYER) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the callers look at the message)
            mixer_from_torch(weights, *layer)
        return str(error.value)

    @pytest.mark.parametrize("key", list(SHAPES))
    def test_missing(self, weights: dict[str, np.ndarray], key: str) -> None:
        shape = weights.pop(key).shape
        message = self.error(weights)
        assert "lacks" in message
        assert f"{key} {shape}" in message

    @pytest.mark.parametrize("key", ["o_proj.weight", "head_projs.3.weight", "q_proj.weight", "x"])
    def test_surplus(self, weights: dict[str, np.ndarray], key: str) -> None:
        message = self.error(weights | {key: np.zeros((3, 3), np.float32)})
        assert "has" in message
        assert key in message

    @pytest.mark.parametrize("key", list(SHAPES))
    def test_misshapen(self, weights: dict[str, np.ndarray], key: str) -> None:
        good = weights[key].shape
        for bad in (weights[key][1:], weights[key][None]):
            message = self.error(weights | {key: bad})
            assert key in message
            assert str(good) in message
            assert str(bad.shape) in message

    def test_transposed(self, weights: dict[str, np.ndarray]) -> None:
        weights["g_proj.weight"] = weights["g_proj.weight"].T
        message = self.error(weights)
        assert "g_proj.weight must have shape (12, 10), got (10, 12)" in message

    def test_integers(self, weights: dict[str, np.ndarray]) -> None:
        message = self.error(weights | {"A_log": np.zeros(3, np.int64)})
        assert "A_log" in message
        assert "int64" in message

    def test_every_missing_and_surplus_key_is_named(self, weights: dict[str, np.ndarray]) -> None:
        del weights["A_log"], weights["dt_bias"]
        assert all(key in self.error(weights) for key in ("A_log", "dt_bias"))
        weights = random_weights()
        zeros = np.zeros(3, np.float32)
        message = self.error(weights | {"first": zeros, "second": zeros})
        assert "first, second" in message

    def test_weights_of_other_options(self, weights: dict[str, np.ndarray]) -> None:
        tied = e88_layer(tie_kv=True, head_mix="per_head", conv_size=3)
        assert "q_proj.weight (12, 10)" in self.error(weights, tied)


def test_weights_laid_out_for_inference_are_refused() -> None:
    trained = E88Mixer(*e88_layer(dtype="bfloat16"), rngs=nnx.Rngs(0))
    before = mixer_to_torch(trained)
    with pytest.raises(ValueError, match=r"made by for_inference.*joined.*rounded to bfloat16"):
        mixer_to_torch(trained.for_inference())
    chex.assert_trees_all_equal(mixer_to_torch(trained), before)
