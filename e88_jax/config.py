"""Configurations of a layer and of a language model: plain data that imports no JAX."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from e88_jax.checks import (
    LARGEST_INT,
    require_bool,
    require_choice,
    require_instance,
    require_int,
    require_number,
    shown,
)

OutputGate = Literal["silu", "sigmoid", "none"]
DecayMode = Literal["mamba", "simple", "constant", "none"]
HeadMix = Literal["concat", "weighted_sum", "per_head", "input_weighted", "sum"]
Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "recurrence", "layer"]


def _set(config: Any, check: Callable[..., Any], *names: str, **options: Any) -> None:
    """Checks fields, and stores them as the plain Python values that they mean."""
    for name in names:
        given = getattr(config, name)
        plain = check(name, given, **options)
        if plain is not given:
            object.__setattr__(config, name, plain)


def _choice(config: Any, name: str, *choices: str | None) -> None:
    _set(config, require_choice, name, choices=choices)


def _dtype_name(dtype: Any) -> Any:
    """The name of a NumPy or JAX dtype; anything else as it is."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    return name if isinstance(name, str) else dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class E88Config:
    """One E88 layer (`E88Mixer`). Sizes are in elements.

    Fields are stored as plain Python values: NumPy's integers, floats and bools are taken too.

    Raises:
        TypeError: a field of another type.
        ValueError: a size out of range, an unknown choice, or options that contradict each other.
    """

    dim: int
    """Width of the residual stream."""
    n_heads: int
    """Heads; each has a state matrix of its own."""
    n_state: int = 32
    """N: length of a key, rows of the state."""
    expansion: float = 1.0
    """V / N: columns of the state over its rows."""
    output_gate: OutputGate = "silu"
    """Activation of the gate that multiplies the heads' outputs."""
    decay_mode: DecayMode = "mamba"
    """Decay from the input and a learned rate (mamba), from the input alone (simple), one learned
    number a head (constant), or no decay."""
    write_gate: bool = False
    """Scale each write by a sigmoid of the input, per head."""
    linear_state: bool = False
    """Leave the tanh out of the recurrence."""
    conv_size: int | None = None
    """Taps of the causal depthwise convolution on q, k and v; None for no convolution."""
    output_norm: bool = False
    """RMS-normalise each head's output before the gate."""
    value_residual: bool = False
    """Add a learned multiple of v to each head's output."""
    tie_kv: bool = False
    """Use the keys, before normalisation, as the values."""
    use_silu: bool = True
    """Apply SiLU to q, k and v."""
    use_l2_norm: bool = True
    """Normalise q and k to unit length."""
    head_mix: HeadMix = "concat"
    """How the heads' outputs become one vector."""
    saved_state_interval: int = 32
    """Steps between the states that the backward pass keeps."""
    implementation: Literal["scan", "mosaic_gpu"] | None = None
    """Who computes the recurrence; None for the fastest that can."""
    dtype: Dtype | None = None
    """Compute dtype of the matmuls; None for bfloat16 on a GPU and float32 elsewhere. A dtype of
    NumPy or JAX, such as `jnp.bfloat16`, is stored as its name."""

    def __post_init__(self) -> None:
        _set(self, require_int, "dim", "n_heads", "n_state", "saved_state_interval")
        _set(self, require_number, "expansion")
        _set(self, require_bool, "write_gate", "linear_state", "output_norm", "value_residual")
        _set(self, require_bool, "tie_kv", "use_silu", "use_l2_norm")
        _choice(self, "output_gate", "silu", "sigmoid", "none")
        _choice(self, "decay_mode", "mamba", "simple", "constant", "none")
        _choice(self, "head_mix", "concat", "weighted_sum", "per_head", "input_weighted", "sum")
        _choice(self, "implementation", None, "scan", "mosaic_gpu")
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        _choice(self, "dtype", None, "float32", "bfloat16", "float64")
        if self.conv_size is not None:
            _set(self, require_int, "conv_size", minimum=2)
        n_value = self.n_state * self.expansion
        if not 1 <= n_value <= LARGEST_INT or n_value != int(n_value):
            raise ValueError(
                f"expansion * n_state must be a whole number of columns, at least 1; "
                f"got {self.expansion} * {self.n_state} = {n_value}."
            )
        if self.tie_kv and self.expansion != 1:
            raise ValueError(
                f"tie_kv uses keys as values and needs expansion = 1, got {self.expansion}."
            )

    @property
    def n_value(self) -> int:
        """V: length of a value, columns of the state."""
        return int(self.n_state * self.expansion)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model (`E88LM`): `depth` identical layers between an embedding and its transpose.

    Raises:
        TypeError: a field of another type.
        ValueError: a size below 1, or an unknown remat.
    """

    layer: E88Config
    depth: int
    """Number of layers."""
    vocab_size: int = 256
    """Token ids run from 0 to vocab_size - 1; 256 for bytes."""
    channel_mixer_dim: int | None = None
    """Hidden width of a SwiGLU channel mixer after each layer's E88 mixer; None for none."""
    remat: Remat = "none"
    """What the backward pass makes again instead of keeping it: nothing, all that is not a matrix
    product (the recurrence with its states and what surrounds it), or whole layers."""

    def __post_init__(self) -> None:
        require_instance("layer", self.layer, E88Config)
        _set(self, require_int, "depth", "vocab_size")
        _choice(self, "remat", "none", "recurrence", "layer")
        if self.channel_mixer_dim is not None:
            _set(self, require_int, "channel_mixer_dim")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LMConfig":
        """The configuration that `to_dict` wrote. Fields with a default may be missing.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of range; the message
                names it.
        """
        if isinstance(values, Mapping) and "layer" in values:
            values = {**values, "layer": _read(E88Config, values["layer"], "layer")}
        return _read(cls, values, "the model's configuration")


def _read(kind: type, values: Any, what: str) -> Any:
    """A configuration from its fields by name."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a dictionary of fields, got {shown(values)}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name for name, x in fields.items() if x.default is dataclasses.MISSING}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{what} lacks {', '.join(missing)}.")
    if unknown := sorted(map(str, values.keys() - fields.keys())):
        raise ValueError(f"{what} has no {', '.join(unknown)}; its fields are {', '.join(fields)}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None
