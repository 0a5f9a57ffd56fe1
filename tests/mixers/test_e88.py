import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.config import E88Config
from e88_jax.interop import mixer_from_torch, mixer_to_torch
from e88_jax.mixers.e88 import E88Mixer, E88State
from e88_jax.naive import rms_ratio
from tests.recurrence_calls import QUICK_TO_COMPILE
from tests.reference import layer as numpy_layer
from tests.reference.configs import E88_OPTIONS, e88_layer, name_of

BATCH, TIME = 2, 8
SEGMENT_IDS = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [5, 2, 2, 5, 5, 5, 5, 5]], np.int32)


def make_input(time: int = TIME, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, time, 10))


def head_major(config: E88Config, state: numpy_layer.State) -> tuple[np.ndarray, Any]:
    """The state as the layer keeps it."""
    return state.recurrent, numpy_layer.join_heads(config, state.conv)


def to_jax(config: E88Config, state: numpy_layer.State, dtype: str) -> E88State:
    wide = "float64" if dtype == "float64" else "float32"
    recurrent, conv = head_major(config, state)
    conv = None if conv is None else jnp.asarray(conv, dtype)
    return E88State(jnp.asarray(recurrent, wide), conv)


def from_torch(options: dict[str, Any], dtype: str = "float64") -> E88Mixer:
    layer = e88_layer(**options, dtype=dtype)
    return mixer_from_torch(numpy_layer.random_weights(layer.config, layer.dim), *layer)


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


# Every value of every option, and those together that act on each other.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"output_gate": "none", "decay_mode": "simple"},
    {"decay_mode": "constant", "use_l2_norm": False},
    {"linear_state": True, "expansion": 0.5},
    {"write_gate": True, "write_gate_scale": 2.0, "linear_state": True, "decay_mode": "simple"},
    {"conv_size": 4, "output_gate": "sigmoid"},
    {"tie_kv": True, "conv_size": 3},
    {"tie_kv": True, "value_residual": True, "use_silu": False},
    {"conv_size": 2, "use_silu": False, "expansion": 1.5, "head_mix": "concat"},
    {"head_mix": "sum", "expansion": 2.0, "output_norm": True, "value_residual": True},
    {"head_mix": "weighted_sum", "expansion": 2.0, "output_norm": True, "output_gate": "none"},
    {"head_mix": "input_weighted", "expansion": 2.0, "output_norm": True, "output_gate": "sigmoid"},
    {"head_mix": "per_head", "expansion": 2.0, "decay_mode": "none", "write_gate": True},
    E88_OPTIONS[-1],
]


class TestAgainstNumpy:
    @pytest.mark.parametrize("options", OPTIONS, ids=name_of)
    def test_results_and_gradients(self, options: dict[str, Any], float64: None) -> None:
        """Documents packed into both rows, after a state of another call's."""
        layer = e88_layer(**options)
        config = layer.config
        weights = numpy_layer.random_weights(config, layer.dim)
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

        graphdef, params = nnx.split(mixer_from_torch(weights, *layer))
        jax_cotangents = jnp.asarray(d_y), to_jax(config, d_state, "float64")

        @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
        def evaluate(params: Any, x: Any, state: Any) -> Any:
            def f(params: Any, x: Any, state: Any) -> Any:
                return nnx.merge(graphdef, params)(x, state, jnp.asarray(SEGMENT_IDS))

            results, pullback = jax.vjp(f, params, x, state)
            return results, pullback(jax_cotangents)

        (y, new_state), (d_params, d_x, d_old) = evaluate(
            params, jnp.asarray(x), to_jax(config, state, "float64")
        )
        expected_y, expected_state = numpy_layer.layer(config, weights, x, state, SEGMENT_IDS)
        assert rms_ratio(y, expected_y) < 1e-10
        assert_close(tuple(new_state), head_major(config, expected_state), 1e-10)

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
        d_conv = (
            {} if d_old.conv is None else numpy_layer.split_heads(config, np.asarray(d_old.conv))
        )
        assert d_conv.keys() == state.conv.keys()
        for name, past in state.conv.items():
            check(
                f"conv state {name}",
                d_conv[name],
                past,
                lambda c, name=name: numpy_loss(
                    weights, x, state._replace(conv=state.conv | {name: c})
                ),
            )

    def test_float32(self) -> None:
        layer = e88_layer(dtype="float32")
        config = layer.config
        weights = numpy_layer.random_weights(config, layer.dim)
        state = numpy_layer.random_state(config, BATCH)
        x = make_input().astype(np.float32)
        mixer = mixer_from_torch(weights, *layer)
        y, new_state = run(mixer, jnp.asarray(x), to_jax(config, state, "float32"))
        expected_y, expected_state = numpy_layer.layer(config, weights, x, state)
        assert rms_ratio(y, expected_y) < 1e-5
        assert_close(tuple(new_state), head_major(config, expected_state), 1e-5)

    def test_bfloat16(self) -> None:
        """Matmuls in bfloat16; parameters, their gradients and the state in float32."""
        layer = e88_layer(**E88_OPTIONS[-1], dtype="bfloat16")
        config = layer.config
        weights = numpy_layer.random_weights(config, layer.dim)
        mixer = mixer_from_torch(weights, *layer)
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
        assert state.conv is not None
        assert state.conv.dtype == jnp.bfloat16
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        chex.assert_tree_all_finite(grads)
        zero = numpy_layer.random_state(config, BATCH)
        zero = jax.tree.map(np.zeros_like, zero)
        expected_y, expected_state = numpy_layer.layer(config, weights, x, zero)
        assert rms_ratio(y, expected_y) < 0.03
        assert rms_ratio(state.recurrent, expected_state.recurrent) < 0.03


def test_bad_input() -> None:
    mixer = from_torch({}, "float32")
    for shape in [(2, 8, 9), (8, 10)]:
        with pytest.raises(ValueError, match=r"\[B, T, 10\]") as error:
            mixer(jnp.zeros(shape))
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 4\)"):
        mixer(jnp.zeros((2, 8, 10)), mixer.init_state(3))


def test_a_layer_fed_zeros_has_finite_gradients() -> None:
    mixer = from_torch({"conv_size": 3}, "float32")

    def loss(mixer: E88Mixer, x: Any) -> Any:
        return jnp.sum(mixer(x)[0] + mixer(x)[1].recurrent[0, 0, 0, 0])

    grads = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(mixer, jnp.zeros((1, 3, 10)))
    chex.assert_tree_all_finite(grads)


def test_a_state_that_does_not_fit() -> None:
    layer = e88_layer(dim=8, n_heads=2, conv_size=3, dtype="float32")
    mixer = E88Mixer(*layer, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 8))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\).*batch of 2, got.*\(3, 2, 4, 4\)"):
        mixer(x, mixer.init_state(3))
    without_conv = E88State(mixer.init_state(2).recurrent, None)
    with pytest.raises(ValueError, match=r"conv=.*batch of 2.*conv=None"):
        mixer(x, without_conv)
