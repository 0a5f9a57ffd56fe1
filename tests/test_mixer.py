import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.activation import l2_normalize
from e88_jax.config import E88Config
from e88_jax.interop import mixer_from_torch, mixer_to_torch
from e88_jax.mixer import E88Mixer, MixerState
from tests.recurrence_contract import QUICK_TO_COMPILE
from tests.reference import layer as numpy_layer
from tests.reference.recurrence import rms_ratio

# Every option alone, then those that act on each other.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"output_gate": "sigmoid"},
    {"output_gate": "none"},
    {"decay_mode": "simple"},
    {"decay_mode": "constant"},
    {"decay_mode": "none"},
    {"write_gate": True},
    {"linear_state": True},
    {"conv_size": 4},
    {"output_norm": True},
    {"value_residual": True},
    {"tie_kv": True},
    {"expansion": 2.0},
    {"expansion": 0.5},
    {"use_silu": False},
    {"use_l2_norm": False},
    {"head_mix": "concat", "expansion": 2.0},
    {"head_mix": "weighted_sum", "expansion": 2.0},
    {"head_mix": "per_head", "expansion": 2.0},
    {"head_mix": "input_weighted", "expansion": 2.0},
    {"head_mix": "sum", "expansion": 2.0},
    {"tie_kv": True, "conv_size": 3},
    {"tie_kv": True, "value_residual": True, "use_silu": False},
    {"output_norm": True, "output_gate": "sigmoid"},
    {"output_norm": True, "output_gate": "none", "head_mix": "weighted_sum"},
    {"output_norm": True, "value_residual": True, "expansion": 2.0},
    {"write_gate": True, "linear_state": True, "decay_mode": "simple"},
    {"conv_size": 2, "use_silu": False, "expansion": 1.5},
    {
        "write_gate": True,
        "conv_size": 4,
        "output_norm": True,
        "value_residual": True,
        "tie_kv": True,
        "head_mix": "per_head",
    },
]
DECODED: list[dict[str, Any]] = [{}, {"conv_size": 4, "expansion": 2.0}, OPTIONS[-1]]
BATCH, TIME = 2, 8
SEGMENT_IDS = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [5, 2, 2, 5, 5, 5, 5, 5]], np.int32)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 for a whole layer; nnx.RMSNorm does not take it under strict promotion."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def name_of(options: dict[str, Any]) -> str:
    return "+".join(f"{k}={v}" for k, v in options.items()) or "default"


def make_config(options: dict[str, Any], dtype: Any = "float64") -> E88Config:
    # No two sizes equal, so that a transposed weight cannot fit.
    return E88Config(dim=10, n_heads=3, n_state=4, saved_state_interval=2, dtype=dtype, **options)


def make_input(time: int = TIME, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, time, 10))


def to_jax(state: numpy_layer.State, dtype: str) -> MixerState:
    wide = "float64" if dtype == "float64" else "float32"
    convs = {name: jnp.asarray(x, dtype) for name, x in state.conv.items()}
    return MixerState(jnp.asarray(state.recurrent, wide), convs)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def _run(graphdef: Any, params: Any, *arguments: Any) -> Any:
    return nnx.merge(graphdef, params)(*arguments)


def run(mixer: E88Mixer, x: Any, state: Any = None, segment_ids: Any = None) -> Any:
    return _run(*nnx.split(mixer), x, state, segment_ids)


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Each array of two trees, by RMS ratio."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert rms_ratio(a, b) < bound


class TestAgainstNumpy:
    @pytest.mark.parametrize("options", OPTIONS, ids=name_of)
    def test_results_and_gradients(self, options: dict[str, Any], float64: None) -> None:
        """Documents packed into both rows, after a state of another call's."""
        config = make_config(options)
        weights = numpy_layer.random_weights(config)
        state = numpy_layer.random_state(config, BATCH)
        x = make_input()
        d_y = make_input(seed=1)
        d_state = numpy_layer.random_state(config, BATCH, seed=1)

        def numpy_loss(weights: Any, x: Any, state: Any) -> float:
            results = numpy_layer.layer(config, weights, x, state, SEGMENT_IDS)
            cotangents = (d_y, d_state)
            return sum(
                np.sum(a * b)
                for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(cotangents), strict=True)
            )

        graphdef, params = nnx.split(mixer_from_torch(weights, config))
        jax_cotangents = jnp.asarray(d_y), to_jax(d_state, "float64")

        @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
        def evaluate(params: Any, x: Any, state: Any) -> Any:
            def f(params: Any, x: Any, state: Any) -> Any:
                return nnx.merge(graphdef, params)(x, state, jnp.asarray(SEGMENT_IDS))

            results, pullback = jax.vjp(f, params, x, state)
            return results, pullback(jax_cotangents)

        (y, new_state), (d_params, d_x, d_old) = evaluate(
            params, jnp.asarray(x), to_jax(state, "float64")
        )
        expected_y, expected_state = numpy_layer.layer(config, weights, x, state, SEGMENT_IDS)
        assert rms_ratio(y, expected_y) < 1e-10
        assert_close(tuple(new_state), tuple(expected_state), 1e-10)

        # Gradients: the slope of the NumPy layer along a random direction of each array.
        gradients = mixer_to_torch(nnx.merge(graphdef, d_params))
        assert gradients.keys() == weights.keys()
        rng = np.random.default_rng(2)

        def check(name: str, gradient: Any, at: np.ndarray, replace: Any) -> None:
            # The gradient itself is the direction of the steepest slope; chance is added to it.
            direction = np.asarray(gradient, np.float64)
            assert np.linalg.norm(direction) > 1e-4, name
            direction = direction / np.linalg.norm(direction)
            direction += rng.normal(size=at.shape) / np.sqrt(at.size)
            step = 1e-5
            slope = (replace(at + step * direction) - replace(at - step * direction)) / (2 * step)
            wanted = np.sum(np.asarray(gradient, np.float64) * direction)
            assert abs(slope - wanted) < 2e-6 * np.linalg.norm(gradient), (name, slope, wanted)

        for key, weight in weights.items():
            check(
                key,
                gradients[key],
                weight.astype(np.float64),
                lambda w, key=key: numpy_loss(weights | {key: w}, x, state),
            )
        check("x", d_x, x, lambda x: numpy_loss(weights, x, state))
        check(
            "recurrent state",
            d_old.recurrent,
            state.recurrent,
            lambda s: numpy_loss(weights, x, state._replace(recurrent=s)),
        )
        for name, past in state.conv.items():
            check(
                f"conv state {name}",
                d_old.conv[name],
                past,
                lambda c, name=name: numpy_loss(
                    weights, x, state._replace(conv=state.conv | {name: c})
                ),
            )

    @pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=name_of)
    def test_float32(self, options: dict[str, Any]) -> None:
        config = make_config(options, "float32")
        weights = numpy_layer.random_weights(config)
        state = numpy_layer.random_state(config, BATCH)
        x = make_input().astype(np.float32)
        mixer = mixer_from_torch(weights, config)
        y, new_state = run(mixer, jnp.asarray(x), to_jax(state, "float32"))
        expected_y, expected_state = numpy_layer.layer(config, weights, x, state)
        assert rms_ratio(y, expected_y) < 1e-5
        assert_close(tuple(new_state), tuple(expected_state), 1e-5)

    @pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=name_of)
    def test_bfloat16(self, options: dict[str, Any]) -> None:
        """Products in bfloat16; parameters, their gradients and the state in float32."""
        config = make_config(options, "bfloat16")
        weights = numpy_layer.random_weights(config)
        mixer = mixer_from_torch(weights, config)
        x = make_input()

        @nnx.jit
        def evaluate(mixer: E88Mixer, x: Any) -> Any:
            def loss(mixer: E88Mixer) -> Any:
                y, state = mixer(x)
                return jnp.sum(y.astype(jnp.float32)), (y, state)

            return nnx.grad(loss, has_aux=True)(mixer)

        grads, (y, state) = evaluate(mixer, jnp.asarray(x, "float32"))
        assert y.dtype == jnp.bfloat16
        assert state.recurrent.dtype == jnp.float32
        assert all(conv.dtype == jnp.bfloat16 for conv in state.conv.values())
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        chex.assert_tree_all_finite(grads)
        zero = numpy_layer.random_state(config, BATCH)
        zero = jax.tree.map(np.zeros_like, zero)
        expected_y, expected_state = numpy_layer.layer(config, weights, x, zero)
        assert rms_ratio(y, expected_y) < 0.03
        assert rms_ratio(state.recurrent, expected_state.recurrent) < 0.03


class TestState:
    @pytest.mark.parametrize("options", DECODED, ids=name_of)
    def test_decoding_and_splits_equal_the_whole(
        self, options: dict[str, Any], float64: None
    ) -> None:
        config = make_config(options)
        mixer = mixer_from_torch(numpy_layer.random_weights(config), config)
        x = jnp.asarray(make_input())
        start = mixer.init_state(BATCH)
        # The id changes inside the parts only: across calls the caller resets the state.
        ids = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 2], [0] * 8], jnp.int32)
        whole = run(mixer, x, start, ids)
        y_0, state = run(mixer, x[:, :4], start, ids[:, :4])
        y_1, state = run(mixer, x[:, 4:], state, ids[:, 4:])
        assert_close((jnp.concatenate([y_0, y_1], axis=1), state), whole, 1e-12)

        whole = run(mixer, x, start, jnp.zeros_like(ids))
        state, rows = start, []
        for t in range(TIME):
            y, state = run(mixer, x[:, t : t + 1], state)
            rows.append(y)
        assert_close((jnp.concatenate(rows, axis=1), state), whole, 1e-12)

    @pytest.mark.parametrize("options", DECODED, ids=name_of)
    def test_packed_documents_equal_separate_runs(
        self, options: dict[str, Any], float64: None
    ) -> None:
        config = make_config(options)
        mixer = mixer_from_torch(numpy_layer.random_weights(config), config)
        x = jnp.asarray(make_input())
        # Four documents as short as the reach of the convolution; an id may come back.
        ids = jnp.asarray([[4, 4, 9, 9, 4, 4, 1, 1]] * BATCH, jnp.int32)
        packed = run(mixer, x, None, ids)
        parts = [run(mixer, x[:, i : i + 2]) for i in range(0, TIME, 2)]
        separate = jnp.concatenate([y for y, _ in parts], axis=1), parts[-1][1]
        assert_close(packed, separate, 1e-12)

    @pytest.mark.parametrize("options", DECODED, ids=name_of)
    def test_the_initial_state_is_that_of_no_state(self, options: dict[str, Any]) -> None:
        config = make_config(options, "float32")
        mixer = mixer_from_torch(numpy_layer.random_weights(config), config)
        x = jnp.asarray(make_input(), "float32")
        chex.assert_trees_all_equal(run(mixer, x, mixer.init_state(BATCH)), run(mixer, x))
        given = jax.tree.map(lambda x: (x.shape, x.dtype), mixer.init_state(BATCH))
        returned = jax.tree.map(lambda x: (x.shape, x.dtype), run(mixer, x)[1])
        assert given == returned

    def test_bad_input(self) -> None:
        config = make_config({}, "float32")
        mixer = mixer_from_torch(numpy_layer.random_weights(config), config)
        for shape in [(2, 8, 9), (8, 10)]:
            with pytest.raises(ValueError, match=r"\[B, T, 10\]") as error:
                mixer(jnp.zeros(shape))
            assert str(shape) in str(error.value)
        with pytest.raises(ValueError, match=r"\(3, 3, 4, 4\)"):
            mixer(jnp.zeros((2, 8, 10)), mixer.init_state(3))


class TestL2Normalize:
    def test_against_numpy(self, x64: None) -> None:
        x = (
            np.random.default_rng(0).normal(size=(3, 2, 5))
            * np.array([1e-6, 1, 1e6])[:, None, None]
        )
        expected = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(l2_normalize(jnp.asarray(x)), expected, rtol=1e-12)
        chex.assert_numerical_grads(l2_normalize, (jnp.asarray(x[1:2]),), order=1, atol=1e-8)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_zero_rows(self, dtype: str) -> None:
        x = jnp.asarray([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype)
        y, pullback = jax.vjp(l2_normalize, x)
        (gradient,) = pullback(jnp.ones_like(y))
        assert y.dtype == gradient.dtype == jnp.dtype(dtype)
        assert not np.any(y[0])
        np.testing.assert_allclose(y[1].astype("float32"), [0.6, 0, 0.8], rtol=4e-3)
        chex.assert_tree_all_finite(gradient)

    def test_a_layer_fed_zeros_has_finite_gradients(self) -> None:
        config = make_config({"conv_size": 3}, "float32")
        mixer = mixer_from_torch(numpy_layer.random_weights(config), config)

        def loss(mixer: E88Mixer, x: Any) -> Any:
            return jnp.sum(mixer(x)[0] + mixer(x)[1].recurrent[0, 0, 0, 0])

        grads = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(mixer, jnp.zeros((1, 3, 10)))
        chex.assert_tree_all_finite(grads)

    def test_bfloat16_sums_in_float32(self) -> None:
        # 4096 equal squares: a bfloat16 sum would stop growing at 256.
        y = l2_normalize(jnp.ones((1, 4096), "bfloat16"))
        np.testing.assert_allclose(y.astype("float32"), 1 / 64, rtol=1e-2)


@pytest.fixture(scope="module")
def mixer() -> E88Mixer:
    return E88Mixer(TestInitialValues.config, rngs=nnx.Rngs(0))


class TestInitialValues:
    config = E88Config(
        dim=64,
        n_heads=40,
        n_state=8,
        expansion=2.0,
        write_gate=True,
        conv_size=4,
        output_norm=True,
        value_residual=True,
        dtype="float32",
    )

    def build(self, **changes: Any) -> E88Mixer:
        """A layer of one option and as little else as can be."""
        minimal = {"write_gate": False, "conv_size": None, "decay_mode": "none"}
        config = dataclasses.replace(self.config, **minimal | changes)
        return E88Mixer(config, rngs=nnx.Rngs(0))

    def check_uniform(self, x: Any, bound: float) -> None:
        """x is uniform in +-bound, as far as its size can tell."""
        x = np.asarray(x)
        assert np.max(np.abs(x)) <= bound * (1 + 1e-6)
        assert np.max(np.abs(x)) > bound * (1 - 10 / x.size)
        # Five standard errors of the mean and of the mean square of a uniform distribution.
        assert abs(np.mean(x)) < 5 * bound / np.sqrt(3 * x.size)
        assert abs(np.mean(x**2) / bound**2 - 1 / 3) < 5 * np.sqrt(4 / 45 / x.size)

    def test_projections_are_xavier_uniform(self, mixer: E88Mixer) -> None:
        dim, keys, values = 64, 320, 640
        fused = np.sqrt(6 / (dim + 2 * keys + values))
        self.check_uniform(mixer.qkv_proj.kernel[...], fused)
        for part in np.split(np.asarray(mixer.qkv_proj.kernel[...]), [keys, 2 * keys], axis=1):
            self.check_uniform(part, fused)
        self.check_uniform(mixer.g_proj.kernel[...], np.sqrt(6 / (dim + values)))
        self.check_uniform(mixer.o_proj.kernel[...], np.sqrt(6 / (dim + values)))
        self.check_uniform(mixer.a_proj.kernel[...], np.sqrt(6 / (dim + 40)))
        tied = self.build(tie_kv=True, expansion=1.0)
        self.check_uniform(tied.q_proj.kernel[...], np.sqrt(6 / (dim + keys)))
        self.check_uniform(tied.k_proj.kernel[...], np.sqrt(6 / (dim + keys)))
        per_head = self.build(head_mix="per_head").head_projs.kernel[...]
        assert per_head.shape == (40, 16, 64)
        self.check_uniform(per_head, np.sqrt(6 / (16 + dim)))
        other = self.build(head_mix="input_weighted", decay_mode="simple")
        self.check_uniform(other.o_proj.kernel[...], np.sqrt(6 / (16 + dim)))
        self.check_uniform(other.head_attn.kernel[...], np.sqrt(6 / (dim + 40)))
        self.check_uniform(other.beta_proj.kernel[...], np.sqrt(6 / (dim + 40)))

    def test_framework_defaults(self, mixer: E88Mixer) -> None:
        """PyTorch's for Linear and Conv1d: uniform in +-1 / sqrt(fan_in)."""
        self.check_uniform(mixer.write_gate_proj.kernel[...], 1 / np.sqrt(64))
        for conv, channels in ((mixer.q_conv, 320), (mixer.k_conv, 320), (mixer.v_conv, 640)):
            assert conv.kernel.shape == (4, channels)
            self.check_uniform(conv.kernel[...], 1 / np.sqrt(4))

    def test_decay(self, mixer: E88Mixer) -> None:
        many = self.build(n_heads=4000, dim=1, decay_mode="mamba")
        for some in (mixer, many):
            A_log, dt_bias = np.asarray(some.A_log[...]), np.asarray(some.dt_bias[...])
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

    def test_constants(self, mixer: E88Mixer) -> None:
        np.testing.assert_array_equal(mixer.value_residual[...], np.ones((40, 16)))
        scale = mixer.o_norm.scale
        assert scale is not None
        np.testing.assert_array_equal(scale[...], np.ones(16))
        other = self.build(head_mix="weighted_sum", decay_mode="constant")
        np.testing.assert_array_equal(other.decay_logit[...], np.full(40, 4.0))
        np.testing.assert_allclose(other.head_weights[...], np.full(40, 1 / 40), rtol=1e-6)

    def test_seeds(self, mixer: E88Mixer) -> None:
        same, other = (E88Mixer(self.config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        chex.assert_trees_all_equal(nnx.state(mixer), nnx.state(same))
        assert not np.array_equal(mixer.A_log[...], other.A_log[...])
        assert not np.array_equal(mixer.qkv_proj.kernel[...], other.qkv_proj.kernel[...])

    def test_parameters_are_float32_and_unbiased(self) -> None:
        for dtype in ("float32", "bfloat16"):
            for options in OPTIONS:
                config = make_config(options, dtype)
                mixer = nnx.eval_shape(lambda c=config: E88Mixer(c, rngs=nnx.Rngs(0)))
                for path, param in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
                    assert param.dtype == jnp.float32
                    assert path[-1] != "bias"


def test_a_state_that_does_not_fit() -> None:
    config = E88Config(dim=8, n_heads=2, n_state=4, conv_size=3)
    mixer = E88Mixer(config, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 8))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\).*batch of 2, got.*\(3, 2, 4, 4\)"):
        mixer(x, mixer.init_state(3))
    without_conv = MixerState(mixer.init_state(2).recurrent, {})
    with pytest.raises(ValueError, match=r"'q'.*batch of 2"):
        mixer(x, without_conv)
