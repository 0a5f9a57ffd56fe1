import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
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
        ({"saved_state_interval": 0}, ["saved_state_interval", "0"]),
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


VALUES = LMConfig(layer=layer(), depth=1).to_dict()


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({**VALUES, "heads": 3}, ["configuration has no heads", "depth", "vocab_size"]),
        ({**VALUES, "layer": {**VALUES["layer"], "dimension": 3}}, ["layer has no dimension"]),
        ({"layer": VALUES["layer"]}, ["configuration lacks depth"]),
        ({"depth": 1}, ["configuration lacks layer"]),
        ({"depth": 1, "layer": {"n_state": 4}}, ["layer lacks dim, n_heads"]),
        ({**VALUES, "depth": "3"}, ["configuration: depth must be an integer", "'3'"]),
        ({**VALUES, "layer": {**VALUES["layer"], "dim": 64.0}}, ["layer: dim", "64.0"]),
        ({**VALUES, "layer": 5}, ["layer must be a dictionary", "5"]),
        ({**VALUES, 3: 5}, ["configuration has no 3"]),
        ([], ["configuration must be a dictionary", "list of length 0"]),
        (None, ["configuration must be a dictionary", "None"]),
    ],
)
def test_what_is_no_written_configuration(values: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=fragments[0]) as error:
        LMConfig.from_dict(values)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_fields_with_a_default_may_be_missing() -> None:
    """So that a file of an earlier version can be read."""
    values = {"layer": {"dim": 64, "n_heads": 4}, "depth": 1}
    assert LMConfig.from_dict(values) == LMConfig(layer=layer(), depth=1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_a_dtype_is_stored_as_its_name(name: str) -> None:
    for dtype in (name, jnp.dtype(name), getattr(jnp, name)):
        assert layer(dtype=dtype) == layer(dtype=name)
        config = LMConfig(layer=layer(dtype=dtype), depth=1)
        assert type(config.layer.dtype) is str
        assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert layer(dtype=np.float32).dtype == "float32"


def test_numbers_are_stored_as_pythons() -> None:
    config = LMConfig(
        layer=layer(dim=np.int64(64), n_heads=np.uint8(4), expansion=1, write_gate=np.True_),
        depth=np.array(2),  # pyright: ignore[reportArgumentType]
        channel_mixer_dim=jnp.int32(7),  # pyright: ignore[reportArgumentType]
    )
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    kept = [config.layer.dim, config.layer.n_heads, config.depth, config.channel_mixer_dim]
    assert kept == [64, 4, 2, 7]
    assert {type(x) for x in kept} == {int}
    assert type(config.layer.expansion) is float
    assert config.layer.write_gate is True


def test_configurations_are_values() -> None:
    assert layer() == layer()
    assert hash(LMConfig(layer=layer(), depth=1)) == hash(LMConfig(layer=layer(), depth=1))
    with pytest.raises(AttributeError):
        layer().dim = 3  # type: ignore[misc]


def test_importing_it_starts_no_jax() -> None:
    """So that a command line answers --help at once."""
    program = (
        "import sys, e88_jax.config, e88_jax.sizing; "
        "sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_of_the_package() -> None:
    import e88_jax

    for name in e88_jax.__all__:
        home = importlib.import_module(f"e88_jax.{e88_jax._HOME[name]}")
        assert getattr(e88_jax, name) is getattr(home, name)
        assert name in dir(e88_jax)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = e88_jax.nothing_such


def test_modules_of_the_package() -> None:
    """Each is there after `import e88_jax` alone."""
    package = Path(__file__).parents[1] / "e88_jax"
    names = {path.stem for path in package.iterdir() if not path.name.startswith("_")}
    names.remove("py")  # py.typed
    program = "import sys, e88_jax; [getattr(e88_jax, name).__name__ for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", program, *sorted(names)], check=True)
    import e88_jax

    assert names <= set(dir(e88_jax))
