"""Parameters, states and operations as a configuration counts them, against the model itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from e88_jax.config import LMConfig
from e88_jax.model import LanguageModel
from e88_jax.sizing import BASELINES, PRESETS, calc_e88_params, find_preset
from tests.reference.configs import lm_config, n_params

TOKENS = (2, 64)


def shapes_of(config: LMConfig) -> LanguageModel:
    """The model, of which only the shapes are made."""
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


@st.composite
def configs(draw: st.DrawFn) -> LMConfig:
    tie_kv = draw(st.booleans())
    return lm_config(
        dim=draw(st.integers(1, 40)),
        n_heads=draw(st.integers(1, 5)),
        n_state=draw(st.integers(1, 6)) * 2,
        expansion=1.0 if tie_kv else draw(st.sampled_from([0.5, 1.0, 2.0])),
        output_gate=draw(st.sampled_from(["silu", "sigmoid", "none"])),
        decay_mode=draw(st.sampled_from(["mamba", "simple", "constant", "none"])),
        write_gate=draw(st.booleans()),
        conv_size=draw(st.sampled_from([None, 2, 4])),
        output_norm=draw(st.booleans()),
        value_residual=draw(st.booleans()),
        tie_kv=tie_kv,
        head_mix=draw(
            st.sampled_from(["concat", "weighted_sum", "per_head", "input_weighted", "sum"])
        ),
        depth=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)),
        channel_mixer_dim=draw(st.sampled_from([None, 1, 24])),
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(configs())
def test_any_configuration_is_counted_exactly(config: LMConfig) -> None:
    model = shapes_of(config)
    assert config.count_params() == n_params(model)
    states = jax.eval_shape(lambda: model.init_state(1))
    assert config.state_size() == sum(state.recurrent.size for state in states)


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_presets_are_counted_exactly(name: str) -> None:
    """Each layer once, and the parameters of the layers as often as they come again."""
    config = find_preset(name).config
    period = len(config.layers)
    model = shapes_of(dataclasses.replace(config, depth=period))
    of_blocks = sum(map(n_params, model.blocks))
    assert config.depth % period == 0
    again = config.depth // period - 1
    assert config.count_params() == n_params(model) + again * of_blocks


def test_the_published_formula_differs_as_said() -> None:
    for preset in PRESETS.values():
        dim, heads, depth = preset.dim, preset.n_heads, preset.depth
        published = calc_e88_params(dim, heads, preset.n_state, depth)
        exact = preset.config.count_params()
        assert exact - published == depth * (dim * heads + 2 * heads - dim) - dim
        assert 1.002 < exact / published < 1.01
        sizes = {"dim": dim, "n_heads": heads, "n_state": preset.n_state, "depth": depth}
        without = lm_config(**sizes, output_gate="none").count_params()
        assert exact - without == depth * dim * heads * preset.n_state


def matmul_flops(jaxpr: Any) -> int:
    """Operations of all matmuls without batch dimensions, which the recurrence has."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), (batched, _)) = equation.params["dimension_numbers"]
            if not batched:
                left = equation.invars[0].aval.shape
                (out,) = equation.outvars
                total += 2 * out.aval.size * jnp.prod(jnp.array([left[i] for i in contracted]))
        for sub in jaxprs_in_params(equation.params):
            total += matmul_flops(sub)
    return int(total)


def test_the_matmuls_of_a_forward_and_backward_pass() -> None:
    sizes = {"dim": 96, "n_heads": 5, "n_state": 8, "depth": 2, "vocab_size": 50}
    execution: dict[str, Any] = {"dtype": "float32", "implementation": "scan"}
    config = lm_config(**sizes, channel_mixer_dim=40, **execution)
    graphdef, params = nnx.split(shapes_of(config))

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, params)(tokens)[0])

    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens)
    counted = matmul_flops(jaxpr.jaxpr) / (TOKENS[0] * TOKENS[1])
    assert abs(config.flops_per_token().matmul / counted - 1) < 0.01


def test_a_preset() -> None:
    flops = PRESETS["h72n32-500m"].config.flops_per_token()
    assert flops.matmul == 6 * 505_089_472
    assert flops.recurrence == 26 * 20 * 72 * 32 * 32
