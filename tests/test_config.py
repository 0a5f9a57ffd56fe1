import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import mixers
from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel
from tests.reference.configs import n_params
from tests.reference.toy_mixer import TOY, ToyConfig, ToyMixer


def layer(**changes: Any) -> E88Config:
    return E88Config(**{"n_heads": 4, **changes})


def model(**changes: Any) -> LMConfig:
    return LMConfig(**{"dim": 64, "depth": 1, "layers": (layer(),), **changes})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy mixer is registered."""
    monkeypatch.setitem(mixers.MIXERS, "toy", TOY)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"n_heads": -3}, ["n_heads", "-3"]),
        ({"n_state": 0}, ["n_state", "0"]),
        ({"conv_size": 1}, ["conv_size", "2", "1"]),
        ({"conv_size": 0}, ["conv_size", "2", "0"]),
        ({"expansion": 0.0}, ["expansion", "0.0 * 32 = 0.0"]),
        ({"expansion": -1.0}, ["expansion", "-1.0 * 32"]),
        ({"expansion": 1.3}, ["expansion", "1.3 * 32 = 41.6"]),
        ({"expansion": 2.0, "tie_kv": True}, ["tie_kv", "expansion", "1", "2.0"]),
        ({"write_gate_scale": 2.0}, ["write_gate_scale", "2.0", "write_gate"]),
        ({"write_gate_scale": 0.0, "write_gate": True}, ["write_gate_scale", "above 0", "0.0"]),
        ({"output_gate": "tanh"}, ["output_gate", "silu", "sigmoid", "none", "tanh"]),
        ({"decay_mode": "gru"}, ["decay_mode", "mamba", "simple", "constant", "none", "gru"]),
        ({"expansion": float("inf")}, ["expansion", "inf"]),
        ({"head_mix": "mean"}, ["head_mix", "concat", "per_head", "input_weighted", "mean"]),
    ],
)
def test_contradictions(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=fragments[0]) as error:
        layer(**changes)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"saved_state_interval": 0}, ["saved_state_interval", "0"]),
        ({"dtype": "flaot32"}, ["dtype", "float32", "bfloat16", "flaot32"]),
        ({"implementation": "cuda"}, ["implementation", "scan", "mosaic_gpu", "cuda"]),
        ({"remat": "all"}, ["remat", "none", "recurrence", "layer", "all"]),
    ],
)
def test_what_no_model_is_run_by(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=fragments[0]) as error:
        Execution(**changes)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("name", ["dim", "depth", "vocab_size", "channel_mixer_dim"])
def test_model_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*0"):
        model(**{name: 0})


def test_layers_are_cycled_over_the_depth() -> None:
    a, b, c = layer(), layer(n_state=8), ToyConfig()
    config = model(depth=5, layers=(a, b, c))
    assert config.mixers == (a, b, c, a, b)
    assert model(depth=3).mixers == (a, a, a)
    assert model(layers=[a]) == model(layers=(a,))
    total = sum(mixer.count_params(64) for mixer in (a, a, b, b, c))
    assert config.count_params() == 256 * 64 + 5 * 64 + 64 + total
    assert config.state_size() == 2 * 4 * 32 * 32 + 2 * 4 * 8 * 32 // 4 + 6
    one, *others = (mixer.flops_per_token(64) for mixer in (a, b, c))
    assert one.recurrence == 26 * 4 * 32 * 32
    flops = config.flops_per_token()
    assert flops.recurrence == 2 * (one.recurrence + others[0].recurrence) + others[1].recurrence
    assert flops.matmul == 6 * config.count_params()


def test_a_model_of_several_mixers() -> None:
    """Built in the order of the cycle, and counted exactly."""
    layers = (layer(n_state=4, conv_size=2), ToyConfig())
    config = model(dim=8, depth=3, layers=layers, execution=Execution(dtype="float32"))
    built = LanguageModel(config, rngs=nnx.Rngs(0))
    kinds = [type(block.mixer) for block in built.blocks]
    assert kinds == [E88Mixer, ToyMixer, E88Mixer]
    assert n_params(built) == config.count_params()
    tokens = jnp.asarray([[1, 2, 3, 4]])
    logits, state = jax.jit(built)(tokens)
    decode, carried = jax.jit(built.for_inference()), built.init_state(1)
    for t in range(4):
        each, carried = decode(tokens[:, t : t + 1], carried)
        np.testing.assert_allclose(each[:, 0], logits[:, t], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), carried, state
    )


@pytest.mark.parametrize(
    ("layers", "fragments"),
    [
        ((), ["from 1 to the depth, 2", "got 0"]),
        ((layer(),) * 3, ["from 1 to the depth, 2", "got 3"]),
    ],
)
def test_numbers_of_layers(layers: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match="layers must be") as error:
        model(depth=2, layers=layers)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("layers", "fragment"),
    [
        (layer(), "tuple of mixers' configurations, of kinds such as e88"),
        ("e88", "tuple of mixers' configurations"),
        ((layer(), "e88"), r"layers\[1\] must be a mixer's configuration.*e88.*, got 'e88'"),
        ((5, layer()), r"layers\[0\] must be a mixer's configuration.*got 5"),
    ],
)
def test_what_are_no_layers(layers: Any, fragment: str) -> None:
    with pytest.raises(TypeError, match=fragment):
        model(depth=2, layers=layers)


def test_kinds(toy: None) -> None:
    assert mixers.config_type("e88") is E88Config
    assert mixers.config_type("toy") is ToyConfig
    with pytest.raises(ValueError, match=r"kind must be .*e88.*toy.*got 'gru'"):
        mixers.config_type("gru")


@pytest.mark.parametrize(("expansion", "n_value"), [(1.0, 32), (2.0, 64), (0.5, 16), (1.25, 40)])
def test_n_value(expansion: float, n_value: int) -> None:
    value = layer(expansion=expansion).n_value
    assert value == n_value
    assert isinstance(value, int)


def read_back(config: LMConfig) -> LMConfig:
    return LMConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_round_trip_through_json(toy: None) -> None:
    config = model(
        depth=3,
        layers=(layer(conv_size=4, expansion=2.0, head_mix="sum"), ToyConfig(width=9)),
        vocab_size=300,
        channel_mixer_dim=128,
        embedding_std=0.5,
        execution=Execution(dtype="bfloat16", saved_state_interval=64, remat="layer"),
    )
    assert read_back(config) == config
    written = config.to_dict()
    assert [layer["kind"] for layer in written["layers"]] == ["e88", "toy"]
    assert written["layers"][1] == {"kind": "toy", "width": 9}
    assert written["execution"]["remat"] == "layer"


VALUES = model().to_dict()
(FIRST,) = VALUES["layers"]


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({**VALUES, "heads": 3}, ["configuration has no heads", "depth", "vocab_size"]),
        (
            {**VALUES, "layers": [{**FIRST, "dimension": 3}]},
            [r"layers\[0\] has no dimension", "n_heads"],
        ),
        ({"layers": [FIRST]}, ["configuration lacks depth, dim"]),
        ({"dim": 8, "depth": 1}, ["configuration lacks layers"]),
        ({**VALUES, "layers": [{"kind": "e88"}]}, [r"layers\[0\] lacks n_heads"]),
        ({**VALUES, "layers": [FIRST, {"n_heads": 4}]}, [r"layers\[1\] lacks kind"]),
        (
            {**VALUES, "layers": [{**FIRST, "kind": "gru"}]},
            [r"layers\[0\]: kind must be", "e88", "'gru'"],
        ),
        ({**VALUES, "layers": [{**FIRST, "kind": ["e88"]}]}, [r"layers\[0\]: kind must be"]),
        ({**VALUES, "depth": "3"}, ["configuration: depth must be an integer", "'3'"]),
        ({**VALUES, "dim": 64.0}, ["configuration: dim", "64.0"]),
        ({**VALUES, "layers": [{**FIRST, "n_heads": 4.0}]}, [r"layers\[0\]: n_heads", "4.0"]),
        ({**VALUES, "layers": []}, ["layers must be from 1 to the depth", "got 0"]),
        ({**VALUES, "layers": [5]}, [r"layers\[0\] must be a dictionary", "5"]),
        ({**VALUES, "layers": FIRST}, ["configuration: layers must be", "got dict"]),
        ({**VALUES, "layers": 5}, ["configuration: layers must be", "got 5"]),
        ({**VALUES, "execution": 5}, ["execution must be a dictionary", "5"]),
        ({**VALUES, "execution": {"dtype": "int8"}}, ["execution: dtype", "'int8'"]),
        ({**VALUES, "execution": {"device": "gpu"}}, ["execution has no device", "remat"]),
        ({**VALUES, 3: 5}, ["configuration has no 3"]),
        ([], ["configuration must be a dictionary", "list of length 0"]),
        (None, ["configuration must be a dictionary", "None"]),
    ],
)
def test_what_is_no_written_configuration(values: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=fragments[0]) as error:
        LMConfig.from_dict(values)
    for fragment in fragments[1:]:
        assert fragment in str(error.value)


def test_fields_with_a_default_may_be_missing() -> None:
    """So that a file of an earlier version can be read."""
    values = {"dim": 64, "depth": 1, "layers": [{"kind": "e88", "n_heads": 4}]}
    assert LMConfig.from_dict(values) == model()
    values["execution"] = {"remat": "layer"}
    assert LMConfig.from_dict(values) == model(execution=Execution(remat="layer"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_a_dtype_is_stored_as_its_name(name: str) -> None:
    dtypes: tuple[Any, ...] = (name, jnp.dtype(name), getattr(jnp, name))
    for dtype in dtypes:
        assert Execution(dtype=dtype) == Execution(dtype=dtypes[0])
        config = model(execution=Execution(dtype=dtype))
        assert type(config.execution.dtype) is str
        assert read_back(config) == config
    assert Execution(dtype=np.float32).dtype == "float32"  # pyright: ignore[reportArgumentType]


def test_numbers_are_stored_as_pythons() -> None:
    first = layer(n_heads=np.uint8(4), expansion=1, write_gate=np.True_)
    config = model(
        dim=np.int64(64),
        layers=(first,),
        depth=np.array(2),
        channel_mixer_dim=jnp.int32(7),
        execution=Execution(saved_state_interval=np.int16(8)),  # pyright: ignore[reportArgumentType]
    )
    assert read_back(config) == config
    kept = [config.dim, first.n_heads, config.depth, config.channel_mixer_dim]
    kept.append(config.execution.saved_state_interval)
    assert kept == [64, 4, 2, 7, 8]
    assert {type(x) for x in kept} == {int}
    assert type(first.expansion) is float
    assert first.write_gate is True


def test_configurations_are_values() -> None:
    assert layer() == layer()
    assert hash(model()) == hash(model())
    with pytest.raises(AttributeError):
        layer().n_heads = 3  # type: ignore[misc]


def test_importing_it_starts_no_jax() -> None:
    """So that a command line answers --help at once."""
    program = (
        "import sys, e88_jax.config, e88_jax.sizing, e88_jax.mixers.base; "
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
