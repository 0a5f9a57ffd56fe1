from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.interop import mixer_from_torch, mixer_to_torch
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LSTMConfig,
    Mamba2Config,
)
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.mixers.gated_deltanet import GatedDeltaNetMixer
from e88_jax.mixers.mamba2 import Mamba2Mixer
from e88_jax.projection import InputProjections
from tests.reference import originals
from tests.reference.configs import E88_OPTIONS, E88Layer, Layer, e88_layer, name_of

AnyLayer = E88Layer | Layer

FLOAT32 = Execution(dtype="float32")
LAYER = e88_layer(conv_size=3, head_mix="per_head", dtype="float32")
GATED_DELTANET = Layer(
    GatedDeltaNetConfig(n_heads=2, n_value_heads=4, head_dim=6, expand_v=0.5, conv_size=3),
    10,
    FLOAT32,
)
MAMBA2 = Layer(
    Mamba2Config(d_state=5, head_dim=3, n_groups=2, expand=1.5, conv_size=2), 12, FLOAT32
)
LAYERS: dict[str, AnyLayer] = {
    "e88": LAYER,
    "gated_deltanet": GATED_DELTANET,
    "mamba2": MAMBA2,
}
MIXERS = {"e88": E88Mixer, "gated_deltanet": GatedDeltaNetMixer, "mamba2": Mamba2Mixer}
SHAPES = {kind: originals.torch_shapes(layer.config, layer.dim) for kind, layer in LAYERS.items()}
KEYS = [(kind, key) for kind, shapes in SHAPES.items() for key in shapes]

ODD_SIZES: list[tuple[GatedDeltaNetConfig | Mamba2Config, int]] = [
    (GatedDeltaNetConfig(n_heads=3, head_dim=4, expand_v=1.5), 10),
    (GatedDeltaNetConfig(n_heads=1, head_dim=1, expand_v=1, conv_size=2), 1),
    (GatedDeltaNetConfig(n_heads=2, n_value_heads=6, head_dim=2, expand_v=3.5, conv_size=7), 3),
    (GatedDeltaNetConfig(n_heads=5, head_dim=3, negative_eigenvalues=True), 4),
    (Mamba2Config(d_state=5, head_dim=4), 10),
    (Mamba2Config(d_state=1, head_dim=1, expand=1, conv_size=2), 1),
    (Mamba2Config(d_state=3, head_dim=2, n_groups=3, expand=3, conv_size=5), 8),
    (Mamba2Config(d_state=2, head_dim=7, n_groups=4, expand=3.5, conv_size=3), 8),
]


def random_weights(layer: AnyLayer = LAYER) -> dict[str, np.ndarray]:
    return originals.random_weights(layer.config, layer.dim)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return random_weights()


def from_torch(weights: Any, layer: AnyLayer) -> Any:
    config, dim, execution = layer
    convert: Any = mixer_from_torch
    return convert(weights, config, dim, execution)


# That the numbers mean the same is tested with the layers, from the same weights
# (mixers/test_e88.py, mixers/test_originals.py).


E88_LAYERS = {name_of(options): e88_layer(**options, dtype="float32") for options in E88_OPTIONS}
# One for each set of weights: the last of the options that have the same.
WITH_WEIGHTS = {
    str(originals.torch_shapes(layer.config, layer.dim)): name for name, layer in E88_LAYERS.items()
}
ROUND_TRIPS: dict[str, AnyLayer] = {name: E88_LAYERS[name] for name in WITH_WEIGHTS.values()}
ROUND_TRIPS |= {
    f"{config.kind}-{i}": Layer(config, dim, FLOAT32) for i, (config, dim) in enumerate(ODD_SIZES)
}


@pytest.mark.parametrize("layer", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip_from_torch(layer: AnyLayer) -> None:
    weights = random_weights(layer)
    mixer = from_torch(weights, layer)
    assert type(mixer) is MIXERS[layer.config.kind]
    assert (mixer.config, mixer.dim, mixer.execution) == layer
    chex.assert_trees_all_equal(mixer_to_torch(mixer), weights)
    # Every parameter, and each from one place.
    read = sum(x.size for x in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert read == sum(x.size for x in weights.values()) == layer.config.count_params(layer.dim)
    chex.assert_tree_all_finite(nnx.state(mixer))


@pytest.mark.parametrize("kind", LAYERS)
def test_round_trip_to_torch(kind: str) -> None:
    config, dim, execution = LAYERS[kind]
    mixer: Any = config.build(dim, execution, rngs=nnx.Rngs(0))
    exported = mixer_to_torch(mixer)
    assert {key: x.shape for key, x in exported.items()} == SHAPES[kind]
    again = from_torch(exported, LAYERS[kind])
    assert nnx.graphdef(mixer) == nnx.graphdef(again)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(mixer))


def test_layouts_of_gated_deltanet() -> None:
    weights = random_weights(GATED_DELTANET)
    mixer = from_torch(weights, GATED_DELTANET)
    inputs, k, v = mixer.inputs, 6, 3
    same = np.testing.assert_array_equal
    same(inputs.k.kernel[:, 1, 4], weights["k_proj.weight"][k + 4])
    same(inputs.v.kernel[:, 3, 2], weights["v_proj.weight"][3 * v + 2])
    same(inputs.gate.kernel[:, 2, 1], weights["g_proj.weight"][2 * v + 1])
    same(inputs.decay.kernel[:, 3], weights["a_proj.weight"][3])
    same(inputs.write.kernel[:, 2], weights["b_proj.weight"][2])
    same(mixer.q_conv.taps[:, 1, 5], weights["q_conv1d.weight"][k + 5, 0])
    same(mixer.projection.kernel[2, 1], weights["o_proj.weight"][:, 2 * v + 1])
    same(mixer.norm.scale[...], weights["o_norm.weight"])


def test_layouts_of_mamba2() -> None:
    """Rows of `in_proj` are z, x, B, C, dt; channels of the convolution are x, B, C."""
    weights = random_weights(MAMBA2)
    mixer = from_torch(weights, MAMBA2)
    inner, groups, n, p = 18, 2, 5, 3
    rows, same = weights["in_proj.weight"], np.testing.assert_array_equal
    inputs = mixer.inputs
    same(inputs.z.kernel[:, 4, 2], rows[4 * p + 2])
    same(inputs.x.kernel[:, 5, 1], rows[inner + 5 * p + 1])
    same(inputs.b.kernel[:, 1, 3], rows[2 * inner + n + 3])
    same(inputs.c.kernel[:, 1, 4], rows[2 * inner + groups * n + n + 4])
    same(inputs.dt.kernel[:, 3], rows[2 * inner + 2 * groups * n + 3])
    channels = weights["conv1d.weight"][:, 0]
    same(mixer.x_conv.taps[:, 2, 1], channels[2 * p + 1])
    same(mixer.b_conv.taps[:, 1, 2], channels[inner + n + 2])
    same(mixer.c_conv.taps[:, 0, 4], channels[inner + groups * n + 4])
    same(mixer.c_conv.bias[1, 2], weights["conv1d.bias"][inner + groups * n + n + 2])
    same(mixer.scale[3, 2], weights["norm.weight"][3 * p + 2])
    same(mixer.projection.kernel[3, 2], weights["out_proj.weight"][:, 3 * p + 2])
    same(mixer.skip[...], weights["D"])


def test_layouts_of_e88(weights: dict[str, np.ndarray]) -> None:
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


@pytest.mark.parametrize("kind", LAYERS)
def test_the_result_is_an_ordinary_layer(kind: str) -> None:
    """Concrete float32 parameters that no caller's array shares, ready to train."""
    config, dim, execution = layer = LAYERS[kind]
    weights = random_weights(layer)
    mixer = from_torch(weights, layer)
    ordinary = nnx.eval_shape(lambda: config.build(dim, execution, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(mixer) == nnx.graphdef(ordinary)
    for leaf in jax.tree.leaves(nnx.state(mixer)):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.float32
    before = jax.tree.map(np.array, nnx.state(mixer))
    for array in weights.values():
        array[:] = 0
    chex.assert_trees_all_equal(nnx.state(mixer), before)
    exported = mixer_to_torch(mixer)
    for array in exported.values():
        assert array.flags.owndata
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.dtype == np.float32
        array[:] = 0
    chex.assert_trees_all_equal(nnx.state(mixer), before)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_any_float_becomes_float32(dtype: str, kind: str) -> None:
    layer = LAYERS[kind]
    given = {key: x.astype(jnp.dtype(dtype)) for key, x in random_weights(layer).items()}
    mixer = from_torch(given, layer)
    expected = {key: x.astype(np.float32) for key, x in given.items()}
    chex.assert_trees_all_equal(mixer_to_torch(mixer), expected)


class TestErrors:
    def error(self, weights: dict[str, Any], layer: AnyLayer = LAYER) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the callers look at the message)
            from_torch(weights, layer)
        return str(error.value)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_missing(self, kind: str) -> None:
        message = self.error({}, LAYERS[kind])
        assert "lacks" in message
        for key, shape in SHAPES[kind].items():
            assert f"{key} {shape}" in message

    @pytest.mark.parametrize(
        ("kind", "key"),
        [
            ("e88", "o_proj.weight"),
            ("e88", "head_projs.3.weight"),
            ("e88", "q_proj.weight"),
            ("e88", "x"),
            ("gated_deltanet", "q_conv1d.bias"),
            ("gated_deltanet", "D"),
            ("mamba2", "in_proj.bias"),
        ],
    )
    def test_surplus(self, kind: str, key: str) -> None:
        weights = random_weights(LAYERS[kind]) | {key: np.zeros((3, 3), np.float32)}
        message = self.error(weights, LAYERS[kind])
        assert "has" in message
        assert key in message

    @pytest.mark.parametrize(("kind", "key"), KEYS)
    def test_misshapen(self, kind: str, key: str) -> None:
        weights = random_weights(LAYERS[kind])
        good = weights[key].shape
        bad = weights[key][1:] if KEYS.index((kind, key)) % 2 else weights[key][None]
        message = self.error(weights | {key: bad}, LAYERS[kind])
        assert f"{key} must have shape {good}, got {bad.shape}" in message

    @pytest.mark.parametrize(("kind", "key"), KEYS)
    def test_not_finite(self, kind: str, key: str) -> None:
        weights = random_weights(LAYERS[kind])
        weights[key].flat[-1] = np.nan
        message = self.error(weights, LAYERS[kind])
        assert f"{key} must be finite in float32, got 1 of {weights[key].size}" in message

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

    def test_weights_of_other_sizes(self) -> None:
        weights = random_weights(MAMBA2)
        other = Layer(Mamba2Config(d_state=4, head_dim=3, n_groups=2, expand=1.5, conv_size=2), 12)
        message = self.error(weights, other)
        assert "in_proj.weight must have shape (58, 12), got (62, 12)" in message
        ungrouped = GatedDeltaNetConfig(n_heads=2, head_dim=6, expand_v=0.5, conv_size=3)
        message = self.error(random_weights(GATED_DELTANET), Layer(ungrouped, 10))
        assert "v_proj.weight must have shape (6, 10), got (12, 10)" in message

    def test_kinds_without_an_original(self) -> None:
        kinds = r"\(e88, gated_deltanet, mamba2\)"
        for config in (AttentionConfig(n_heads=2, head_dim=4), LSTMConfig(width=4)):
            name = type(config).__name__
            with pytest.raises(
                TypeError,
                match=f"config .*{kinds}, E88Config, GatedDeltaNetConfig or Mamba2Config.*{name}",
            ):
                from_torch({}, Layer(config, 8))
        attention: Any = AttentionConfig(n_heads=2, head_dim=4).build(8, FLOAT32, rngs=nnx.Rngs(0))
        with pytest.raises(
            TypeError,
            match=f"mixer .*{kinds}, E88Mixer, .* or Mamba2Mixer; got AttentionMixer",
        ):
            mixer_to_torch(attention)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_laid_out_for_inference_are_refused(kind: str) -> None:
    config, dim, _ = LAYERS[kind]
    trained: Any = config.build(dim, Execution(dtype="bfloat16"), rngs=nnx.Rngs(0))
    before = mixer_to_torch(trained)
    with pytest.raises(ValueError, match=r"made by for_inference.*joined.*rounded to bfloat16"):
        mixer_to_torch(trained.for_inference())
    chex.assert_trees_all_equal(mixer_to_torch(trained), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_mixers_without_values_are_refused(kind: str) -> None:
    config, dim, execution = LAYERS[kind]
    shapes: Any = nnx.eval_shape(lambda: config.build(dim, execution, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="mixer must hold arrays"):
        mixer_to_torch(shapes)
