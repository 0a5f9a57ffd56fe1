import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

from e88_jax.config import E88Config, LMConfig


def layer(**changes: Any) -> E88Config:
    return E88Config(**{"dim": 64, "n_heads": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"dim": 0}, ["dim", "0"]),
        ({"n_heads": -3}, ["n_heads", "-3"]),
        ({"n_state": 0}, ["n_state", "0"]),
        ({"checkpoint_every": 0}, ["checkpoint_every", "0"]),
        ({"conv_size": 1}, ["conv_size", "2", "1"]),
        ({"conv_size": 0}, ["conv_size", "2", "0"]),
        ({"expansion": 0.0}, ["expansion", "0.0 * 32 = 0.0"]),
        ({"expansion": -1.0}, ["expansion", "-1.0 * 32"]),
        ({"expansion": 1.3}, ["expansion", "1.3 * 32 = 41.6"]),
        ({"expansion": 2.0, "tie_kv": True}, ["tie_kv", "expansion", "1", "2.0"]),
        ({"output_gate": "tanh"}, ["output_gate", "silu", "sigmoid", "none", "tanh"]),
        ({"decay_mode": "gru"}, ["decay_mode", "mamba", "simple", "constant", "none", "gru"]),
        ({"dtype": "flaot32"}, ["dtype", "float32", "bfloat16", "flaot32"]),
        ({"implementation": "cuda"}, ["implementation", "scan", "mosaic_gpu", "cuda"]),
        ({"expansion": float("inf")}, ["expansion", "inf"]),
        ({"head_mix": "mean"}, ["head_mix", "concat", "per_head", "input_weighted", "mean"]),
    ],
)
def test_contradictions(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=fragments[0]) as error:
        layer(**changes)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("changes", [{"depth": 0}, {"vocab_size": 0}, {"channel_mixer_dim": 0}])
def test_model_sizes(changes: dict[str, int]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}.*0"):
        LMConfig(**{"layer": layer(), "depth": 2, **changes})


@pytest.mark.parametrize(("expansion", "n_value"), [(1.0, 32), (2.0, 64), (0.5, 16), (1.25, 40)])
def test_n_value(expansion: float, n_value: int) -> None:
    value = layer(expansion=expansion).n_value
    assert value == n_value
    assert isinstance(value, int)


def test_round_trip_through_json() -> None:
    config = LMConfig(
        layer=layer(conv_size=4, expansion=2.0, head_mix="sum", dtype="bfloat16"),
        depth=3,
        vocab_size=300,
        channel_mixer_dim=128,
    )
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_refused() -> None:
    values = LMConfig(layer=layer(), depth=1).to_dict()
    with pytest.raises(TypeError, match="heads"):
        LMConfig.from_dict({**values, "heads": 3})
    with pytest.raises(TypeError, match="dimension"):
        LMConfig.from_dict({**values, "layer": {**values["layer"], "dimension": 3}})


def test_configurations_are_values() -> None:
    assert layer() == layer()
    assert hash(LMConfig(layer=layer(), depth=1)) == hash(LMConfig(layer=layer(), depth=1))
    with pytest.raises(AttributeError):
        layer().dim = 3  # type: ignore[misc]


def test_importing_it_starts_no_jax() -> None:
    """So that a command line answers --help at once."""
    program = "import sys, e88_jax.config; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_of_the_package() -> None:
    import e88_jax

    for name in e88_jax.__all__:
        home = importlib.import_module(f"e88_jax.{e88_jax._HOME[name]}")
        assert getattr(e88_jax, name) is getattr(home, name)
        assert name in dir(e88_jax)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = e88_jax.nothing_such
