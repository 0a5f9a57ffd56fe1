"""A model's flags on the command line: those of its mixer, its sizes and its execution, flat."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers import MIXERS, config_type
from e88_jax.mixers.base import Execution

from .errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of a model whose layers all have one mixer; `LMConfig` without its tuple."""

    mixer: str
    """Kind of the layers' mixer; its flags, below, depend on it."""
    dim: int
    """Width of the residual stream."""
    depth: int
    """Number of layers."""
    layer: E88Config
    """Stands for the configuration of the mixer."""
    vocab_size: int
    """Token ids run from 0 to vocab_size - 1; 256 for bytes."""
    channel_mixer_dim: int | None
    """Hidden width of a SwiGLU channel mixer after each layer's mixer; None for none."""
    execution: Execution


def registry(args: Sequence[str]) -> ConstructorRegistry:
    """Tyro's rules that read an `LMConfig` from flags.

    Args:
        args: the command line, which names the mixer.
    """
    rules = ConstructorRegistry()

    @rules.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not LMConfig:
            return None
        default: LMConfig = info.default
        named, layer = named_mixer(args), default.layers[0]
        kind = named or layer.kind
        same = (x.name for x in dataclasses.fields(LMConfig) if x.name != "layers")
        values = {name: getattr(default, name) for name in same}
        flags = ModelFlags(mixer=kind, layer=E88Config(n_heads=1), **values)
        made = StructTypeInfo.make(ModelFlags, flags, in_union_context=False)
        spec = ConstructorRegistry.get_struct_spec(made)
        assert isinstance(spec, StructConstructorSpec)
        own = layer if layer.kind == kind else tyro.MISSING_NONPROP
        changed: dict[str, dict[str, Any]] = {
            "mixer": {"type": Literal[tuple(MIXERS)]},
            "layer": {"type": config_type(kind), "default": own},
        }
        fields = [dataclasses.replace(x, **changed.get(x.name, {})) for x in spec.fields]
        if named is None and len(default.layers) > 1:  # as of a stored model; these have no flags
            own_flags = [x for x in fields if x.name not in changed]
            several = functools.partial(LMConfig, layers=default.layers)
            return StructConstructorSpec(several, tuple(own_flags))
        return StructConstructorSpec(_build, tuple(fields))

    return rules


def _build(*, mixer: str, layer: Any, **values: Any) -> LMConfig:
    assert layer.kind == mixer, "the flags are those of the mixer"
    return LMConfig(layers=(layer,), **values)


def named_mixer(args: Sequence[str]) -> str | None:
    """The kind of mixer that a command line names, if any.

    Raises:
        UsageError: there is no such kind.
    """
    kind = None
    for i, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag == "--mixer" and (equals or i + 1 < len(args)):
            kind = value if equals else args[i + 1]
    if kind is not None and kind not in MIXERS:
        raise UsageError(f"--mixer must be one of {', '.join(MIXERS)}, got {kind!r}.")
    return kind


def kind_of(config: Any, args: Sequence[str]) -> str:
    """The kind of mixer that a command line names, else that of the model of `config`."""
    model = getattr(config, "model", None)
    default = model.layers[0].kind if isinstance(model, LMConfig) else E88Config.kind
    return named_mixer(args) or default


def flag_types(kind: str) -> dict[str, Any]:
    """Types of the model's flags by name, with those of the mixer and of execution."""
    types = {field.name: field.type for field in dataclasses.fields(ModelFlags)}
    return {**types, "layer": config_type(kind)}
