"""Small layers and models from flat keywords, and every option of the E88 layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from flax import nnx

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution, MixerConfig
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel

# Every option alone, then those that act on each other.
E88_OPTIONS: list[dict[str, Any]] = [
    {},
    {"output_gate": "sigmoid"},
    {"output_gate": "none"},
    {"decay_mode": "simple"},
    {"decay_mode": "constant"},
    {"decay_mode": "none"},
    {"write_gate": True},
    {"write_gate": True, "write_gate_scale": 2.0, "linear_state": True},
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


def name_of(options: Mapping[str, Any]) -> str:
    return "+".join(f"{k}={v}" for k, v in options.items()) or "default"


class Layer(NamedTuple):
    """The arguments of a mixer of any kind."""

    config: MixerConfig
    dim: int
    execution: Execution = Execution()


class E88Layer(NamedTuple):
    """The arguments of an E88 layer: `E88Mixer(*layer, rngs=rngs)`."""

    config: E88Config
    dim: int
    execution: Execution = Execution()


def e88_layer(*, dim: int = 10, n_heads: int = 3, n_state: int = 4, **options: Any) -> E88Layer:
    """An E88 layer in which no two sizes are equal, so that a transposed weight cannot fit.

    Args:
        options: fields of `E88Config` and `Execution`; the dtype is float64, and a state is saved
            every 2 steps, unless they say otherwise.
    """
    options = {"dtype": "float64", "saved_state_interval": 2, **options}
    execution = _take(Execution, options)
    config = E88Config(n_heads=n_heads, n_state=n_state, **options)
    return E88Layer(config, dim, Execution(**execution))


def lm_config(
    *,
    dim: int = 12,
    depth: int = 1,
    n_heads: int = 3,
    n_state: int = 4,
    vocab_size: int = 256,
    channel_mixer_dim: int | None = None,
    **options: Any,
) -> LMConfig:
    """A model of E88 layers; `options` are fields of `E88Config` and `Execution`."""
    execution = Execution(**_take(Execution, options))
    layer = E88Config(n_heads=n_heads, n_state=n_state, **options)
    return LMConfig(
        dim=dim,
        depth=depth,
        layers=(layer,),
        vocab_size=vocab_size,
        channel_mixer_dim=channel_mixer_dim,
        execution=execution,
    )


def e88_mixers(model: LanguageModel) -> list[E88Mixer]:
    """The mixers of a model of E88 layers."""
    mixers = [block.mixer for block in model.blocks]
    assert all(isinstance(mixer, E88Mixer) for mixer in mixers)
    return cast(list[E88Mixer], mixers)


def n_params(module: nnx.Module) -> int:
    """Numbers in a module's parameters, which may be shapes alone."""
    return sum(param.size for _, param in nnx.to_flat_state(nnx.state(module, nnx.Param)))


def _take(kind: type[Execution], options: dict[str, Any]) -> dict[str, Any]:
    """Removes the fields of `kind` from `options`, and returns them."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: options.pop(name) for name in names if name in options}
