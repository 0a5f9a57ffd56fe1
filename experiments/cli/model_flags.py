"""A model's flags on the command line: its sizes, its execution and its layers' mixers.

`--mixer KIND` gives all layers one mixer, whose flags are plain, such as `--n-heads`. `--layout
KIND,KIND,...` repeats mixers over the depth; the flags of each kind then begin with it, such as
`--attention.n-heads`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers import MIXERS, config_type
from e88_jax.mixers.base import Execution, MixerConfig

from .errors import UsageError
from .names import flag_of, value_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of a model whose layers all have one mixer; `LMConfig` without its tuple."""

    mixer: str
    """Kind of the layers' mixer; its flags, below, depend on it."""
    layout: Annotated[str | None, tyro.conf.arg(metavar="KIND,KIND,...")]
    """Instead of --mixer, kinds of mixers that are repeated over the depth, such as
    e88,e88,e88,attention. Flags of a kind then begin with it, as in --attention.n-heads."""
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
    embedding_std: float
    """Standard deviation of the initial embedding."""
    execution: Execution


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers that a command line describes, and their flags."""

    kinds: tuple[str, ...]
    """Kinds of mixers, repeated over the depth."""
    prefixed: bool
    """Whether flags begin with their kind, as in a layout."""
    default: LMConfig
    """Model whose layers have the values of flags that are not given."""

    @property
    def flag_kinds(self) -> tuple[str, ...]:
        """Kinds that have flags, each once: all but those of which the default has layers that
        differ, as a model made in Python may, and which stay as they are."""
        kinds = tuple(dict.fromkeys(self.kinds))
        if self.kinds != kinds_of(self.default):
            return kinds
        several = [layer.kind for layer in dict.fromkeys(self.default.layers)]
        return tuple(kind for kind in kinds if several.count(kind) == 1)

    def default_of(self, kind: str) -> MixerConfig | None:
        """The default's first layer of a kind, if it has one."""
        return next((layer for layer in self.default.layers if layer.kind == kind), None)

    def flags(self) -> list[str]:
        """The model's flags."""
        names = {field.name for field in dataclasses.fields(ModelFlags)} - {"layer", "execution"}
        names -= {"mixer"} if self.prefixed else set()
        names |= {field.name for field in dataclasses.fields(Execution)}
        own = [_flag(kind, field, self.prefixed) for kind, field in self._fields()]
        return [*map(flag_of, sorted(names)), *own]

    def misspelt(self) -> dict[str, list[str]]:
        """The layers' flags by their spelling with --mixer instead of --layout, or with --layout
        instead of --mixer."""
        found: dict[str, list[str]] = {}
        for kind, field in self._fields():
            flags = found.setdefault(_flag(kind, field, not self.prefixed), [])
            flags.append(_flag(kind, field, self.prefixed))
        return found

    def hint_at_kind(self, flag: str) -> str | None:
        """Advice for a flag of a kind that has no flags; None for any other flag."""
        kind = flag.removeprefix("--").partition(".")[0].replace("-", "_")
        if "." not in flag or kind not in MIXERS or kind in self.flag_kinds:
            return None
        if kind in self.kinds:
            return f"the model's layers of {kind} differ, so that they have no flags."
        return f"it needs a layer of {kind}, as in --layout {','.join([*self.kinds, kind])}."

    def _fields(self) -> list[tuple[str, str]]:
        """Kind and name of each flag of the layers; a bool has two."""
        return [
            (kind, name)
            for kind in self.flag_kinds
            for field in dataclasses.fields(config_type(kind))
            for name in ([field.name, f"no_{field.name}"] if field.type is bool else [field.name])
        ]


def kinds_of(model: LMConfig) -> tuple[str, ...]:
    """The kinds of a model's layers, which are repeated over the depth."""
    return tuple(layer.kind for layer in model.layers)


def layers_of(default: LMConfig, args: Sequence[str]) -> Layers:
    """The layers that --mixer or --layout names, else those of `default`.

    Raises:
        UsageError: both are given, or one names a kind that there is not.
    """
    mixer, layout = value_of("--mixer", args), value_of("--layout", args)
    if mixer is not None and layout is not None:
        raise UsageError(
            "--mixer and --layout both choose the mixers: give --layout for layers of several "
            "kinds, --mixer for layers of one."
        )
    if mixer is not None:
        if mixer not in MIXERS:
            raise UsageError(f"--mixer must be one of {', '.join(MIXERS)}, got {mixer!r}.")
        return Layers((mixer,), False, default)
    if layout is None:
        return Layers(kinds_of(default), len(default.layers) > 1, default)
    kinds = tuple(kind.strip() for kind in layout.split(","))
    if not all(kinds):
        what = "is empty" if not any(kinds) else f"{layout!r} has an empty element"
        raise UsageError(f"--layout {what}: name kinds as in --layout e88,e88,attention.")
    for kind in kinds:
        if kind not in MIXERS:
            choices = ", ".join(MIXERS)
            raise UsageError(f"--layout takes kinds {choices}, joined by commas, got {kind!r}.")
    return Layers(kinds, True, default)


def changed_layers(before: LMConfig, now: LMConfig) -> dict[str, tuple[Any, Any]]:
    """The flags in which the layers of two models differ, each with its value before and now."""
    kinds = kinds_of(before), kinds_of(now)
    if kinds[0] != kinds[1]:
        flag = "--layout" if max(map(len, kinds)) > 1 else "--mixer"
        return {flag: (",".join(kinds[0]), ",".join(kinds[1]))}
    return {
        _flag(old.kind, name, len(before.layers) > 1): (getattr(old, name), getattr(new, name))
        for old, new in zip(before.layers, now.layers, strict=True)
        for name in old.__dataclass_fields__
        if getattr(old, name) != getattr(new, name)
    }


def registry(layers: Layers | None, *, fixed: LMConfig | None = None) -> ConstructorRegistry:
    """Tyro's rules that read an `LMConfig` from flags.

    Args:
        layers: which flags there are; None for those of a configuration without a model.
        fixed: a model that is taken as it is, without flags.
    """
    specs: dict[Any, StructConstructorSpec] = {}
    if fixed is not None:
        specs[LMConfig] = StructConstructorSpec(lambda: fixed, ())
    elif layers is not None:
        specs[LMConfig] = _model_spec(layers)
        for kind in layers.flag_kinds if layers.prefixed else ():
            specs[config_type(kind)] = _prefixed_spec(kind, layers.default_of(kind))
    rules = ConstructorRegistry()
    rules.struct_rule(lambda info: specs.get(info.type))
    return rules


def _model_spec(layers: Layers) -> StructConstructorSpec:
    same = (field.name for field in dataclasses.fields(LMConfig) if field.name != "layers")
    flags = ModelFlags(
        mixer=layers.kinds[0],
        layout=",".join(layers.kinds) if layers.prefixed else None,
        layer=E88Config(n_heads=1),
        **{name: getattr(layers.default, name) for name in same},
    )
    fields: list[StructFieldSpec] = []
    for field in _spec(ModelFlags, flags).fields:
        if field.name == "layer":
            fields += [_mixer_field(field, kind, layers) for kind in layers.flag_kinds]
        elif field.name == "mixer":
            choice = dataclasses.replace(field, type=Literal[tuple(MIXERS)])
            fields += [] if layers.prefixed else [choice]
        else:
            fields.append(field)
    return StructConstructorSpec(functools.partial(_build, layers), tuple(fields))


def _mixer_field(field: StructFieldSpec, kind: str, layers: Layers) -> StructFieldSpec:
    """The field of a kind's configuration; `field` stands for it."""
    mixer: Any = config_type(kind)
    field = dataclasses.replace(field, type=mixer, default=_or_missing(layers.default_of(kind)))
    if not layers.prefixed:
        return field
    titled = Annotated[mixer, tyro.conf.arg(name=kind, prefix_name=False)]
    about = (mixer.__doc__ or "").partition("\n")[0]
    return dataclasses.replace(field, name=kind, type=titled, helptext=about)


def _prefixed_spec(kind: str, default: MixerConfig | None) -> StructConstructorSpec:
    """The configuration of a kind, by flags that begin with it."""
    mixer = config_type(kind)

    def build(**values: Any) -> MixerConfig:
        try:
            return mixer(**values)
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from None

    fields: list[StructFieldSpec] = []
    for field in _spec(mixer, _or_missing(default)).fields:
        own: Any = Annotated[field.type, tyro.conf.arg(name=f"{kind}.{field.name}")]
        fields.append(dataclasses.replace(field, type=own))
    return StructConstructorSpec(build, tuple(fields))


def _or_missing(default: MixerConfig | None) -> Any:
    return tyro.MISSING_NONPROP if default is None else default


def _spec(dataclass: type, default: Any) -> StructConstructorSpec:
    """Tyro's own reading of a dataclass."""
    info = StructTypeInfo.make(dataclass, default, in_union_context=False)
    spec = ConstructorRegistry.get_struct_spec(info)
    assert isinstance(spec, StructConstructorSpec)
    return spec


def _build(
    layers: Layers, *, depth: int, mixer: str = "", layout: str | None = None, **values: Any
) -> LMConfig:
    del mixer, layout  # `layers` says the same
    kinds = layers.flag_kinds
    built = {kind: values.pop(kind if layers.prefixed else "layer") for kind in kinds}
    stack = tuple(
        built[kind] if kind in built else layers.default.layers[i]
        for i, kind in enumerate(layers.kinds)
    )
    if layers.prefixed and 1 <= depth < len(stack):
        raise ValueError(
            f"the layout {','.join(layers.kinds)} has {len(stack)} layers, more than --depth "
            f"{depth}: shorten the layout or raise --depth."
        )
    return LMConfig(depth=depth, layers=stack, **values)


def _flag(kind: str, field: str, prefixed: bool) -> str:
    return flag_of(f"{kind}.{field}" if prefixed else field)
