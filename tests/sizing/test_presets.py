"""The numbers of the sizing guide."""

from typing import Any

import pytest
from flax import nnx

from e88_jax.sizing import BASELINES, PRESETS, balance, d_inner_of, find_preset

# d_inner and dim / d_inner, as printed; the guide has no ratio at 100M.
PRINTED = {
    "h32n32-100m": (1024, None),
    "h40n32-100m": (1280, None),
    "h24n48-100m": (1152, None),
    "h64n32-500m": (2048, 1.19),
    "h68n32-500m": (2176, 1.06),
    "h72n32-500m": (2304, 0.94),
    "h76n32-500m": (2432, 0.84),
    "h48n48-500m": (2304, 0.94),
    "h40n64-500m": (2560, 0.75),
    "h96n32-1b": (3072, 0.92),
    "h80n48-1b": (3840, 0.70),
    "h64n64-1b": (4096, 0.63),
}


def state_per_layer(name: str) -> int:
    config = PRESETS[name].config
    (layer,) = config.layers
    assert config.state_size() == config.depth * layer.state_size(config.dim)
    return layer.state_size(config.dim)


@pytest.mark.parametrize("name", PRESETS)
def test_dimensions_and_state_are_as_printed(name: str) -> None:
    preset = PRESETS[name]
    d_inner, ratio = PRINTED[name]
    assert d_inner_of(preset.config) == d_inner
    if ratio is not None:
        assert abs(preset.dim / d_inner - ratio) < 0.0051  # 0.625 is printed as 0.63
    printed = int(preset.published_state.removesuffix("K"))
    assert abs(state_per_layer(name) / 1000 - printed) < 1


def test_the_formula_gives_the_printed_counts_at_500m_only() -> None:
    agrees = {name: preset.agrees for name, preset in PRESETS.items()}
    assert agrees == {name: name.endswith("500m") for name in PRESETS}
    counts = {name: round(p.formula_params / 1e6, 1) for name, p in PRESETS.items()}
    assert counts["h64n32-500m"] == 498.8
    assert counts["h72n32-500m"] == 502.0
    assert counts["h40n64-500m"] == 492.1
    assert counts["h32n32-100m"] == 131.5
    assert counts["h80n48-1b"] == pytest.approx(1239.5, abs=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_corrected_dim_gives_the_printed_count(name: str) -> None:
    preset = PRESETS[name]
    if preset.agrees:
        assert preset.corrected_dim is None
        return
    assert preset.corrected_dim is not None
    assert preset.corrected_dim % 8 == 0
    exact = preset.with_dim(preset.corrected_dim).count_params()
    assert abs(exact / preset.published_params - 1) <= 0.01
    assert abs(preset.config.count_params() / preset.published_params - 1) > 0.02


def test_corrected_dims_are_the_roundest_that_do() -> None:
    """Multiples of 64 where one is near enough, else of 32 or 16."""
    corrected = {name: p.corrected_dim for name, p in PRESETS.items() if p.corrected_dim}
    assert corrected == {
        "h32n32-100m": 1024,
        "h40n32-100m": 832,
        "h24n48-100m": 912,
        "h96n32-1b": 2720,
        "h80n48-1b": 2208,
        "h64n64-1b": 2080,
    }


def test_rows_outside_of_the_balanced_band() -> None:
    bands = {name: balance(p.dim, d_inner_of(p.config)) for name, p in PRESETS.items()}
    assert {name: band for name, band in bands.items() if band != "balanced"} == {
        "h32n32-100m": "mild bottleneck",
        "h40n64-500m": "over-provisioned d_inner",
        "h80n48-1b": "over-provisioned d_inner",
        "h64n64-1b": "over-provisioned d_inner",
    }


def test_baselines() -> None:
    states = {name: baseline.state_per_layer for name, baseline in BASELINES.items()}
    assert states == {"mamba2-500m": 3200 * 128, "gated-deltanet-500m": 24 * 128 * 128}
    assert list(states.values()) == [409_600, 393_216]
    counts = {name: baseline.config.count_params() for name, baseline in BASELINES.items()}
    assert all(abs(count / 500e6 - 1) < 0.02 for count in counts.values())
    h72, h40 = map(state_per_layer, ("h72n32-500m", "h40n64-500m"))
    assert 5 < 393_216 / h72 < 409_600 / h72 < 6  # "5-6x smaller"
    assert round(409_600 / h40, 1) == 2.5  # "2.5x smaller"
    assert round(393_216 / h40, 1) == 2.4


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_any_is_found_by_name(name: str) -> None:
    found = find_preset(name)
    assert found.name == name
    assert found.config == (PRESETS | BASELINES)[name].config


@pytest.mark.parametrize(
    ("name", "state"), [("mamba2-500m", 409_600), ("gated-deltanet-500m", 393_216)]
)
def test_the_state_of_a_built_layer(name: str, state: int) -> None:
    config = find_preset(name).config
    (layer,) = config.layers

    def init_state() -> Any:
        return layer.build(config.dim, config.execution, rngs=nnx.Rngs(0)).init_state(1)

    assert nnx.eval_shape(init_state).recurrent.size == state


def test_names_differ() -> None:
    assert not PRESETS.keys() & BASELINES.keys()


def test_the_guides_example() -> None:
    """n_state 32 and d_inner 2048 to 2432 give 64 to 76 heads."""
    assert (2048 // 32, 2432 // 32) == (64, 76)
    for name, heads in (("h64n32-500m", 64), ("h76n32-500m", 76)):
        assert PRESETS[name].n_heads == heads


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'h1'.*h72n32-500m.*mamba2-500m"):
        find_preset("h1")
