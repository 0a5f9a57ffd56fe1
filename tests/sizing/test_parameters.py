import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from e88_jax import model
from e88_jax.config import E88Config, LMConfig
from e88_jax.sizing import PRESETS, calc_e88_params, count_params


def built(config: LMConfig) -> int:
    """Parameters of the model itself, of which only the shapes are made."""
    return model.count_params(nnx.eval_shape(lambda: model.E88LM(config, rngs=nnx.Rngs(0))))


@st.composite
def configs(draw: st.DrawFn) -> LMConfig:
    tie_kv = draw(st.booleans())
    layer = E88Config(
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
    )
    return LMConfig(
        layer=layer,
        depth=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)),
        channel_mixer_dim=draw(st.sampled_from([None, 1, 24])),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(configs())
def test_any_configuration_is_counted_exactly(config: LMConfig) -> None:
    assert count_params(config) == built(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_counted_exactly(name: str) -> None:
    config = PRESETS[name].config
    assert count_params(config) == built(config)


def test_the_published_formula_differs_as_said() -> None:
    for preset in PRESETS.values():
        dim, heads, depth = preset.dim, preset.n_heads, preset.depth
        published = calc_e88_params(dim, heads, preset.n_state, depth)
        exact = count_params(preset.config)
        assert exact - published == depth * (dim * heads + 2 * heads - dim) - dim
        assert 1.002 < exact / published < 1.01
        without = LMConfig(
            layer=E88Config(dim=dim, n_heads=heads, n_state=preset.n_state, output_gate="none"),
            depth=depth,
        )
        assert exact - count_params(without) == depth * dim * heads * preset.n_state
