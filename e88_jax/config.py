"""Configurations of a layer and of a language model: plain data that imports no JAX."""

import dataclasses
import math
from typing import Any, Literal

OutputGate = Literal["silu", "sigmoid", "none"]
DecayMode = Literal["mamba", "simple", "constant", "none"]
HeadMix = Literal["concat", "weighted_sum", "per_head", "input_weighted", "sum"]
Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "recurrence", "layer"]


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _require_choice(config: Any, name: str, choices: tuple[str | None, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class E88Config:
    """One E88 layer (`E88Mixer`). Sizes are in elements.

    Raises:
        ValueError: sizes or options that contradict each other.
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
    checkpoint_every: int = 32
    """Steps between the states that the backward pass keeps."""
    implementation: Literal["scan", "mosaic_gpu"] | None = None
    """Who computes the recurrence; None for the fastest that can."""
    dtype: Dtype | None = None
    """Of the matrix products; None for bfloat16 on a GPU and float32 elsewhere."""

    def __post_init__(self) -> None:
        _require_positive(self, "dim", "n_heads", "n_state", "checkpoint_every")
        _require_choice(self, "output_gate", ("silu", "sigmoid", "none"))
        _require_choice(self, "decay_mode", ("mamba", "simple", "constant", "none"))
        _require_choice(
            self, "head_mix", ("concat", "weighted_sum", "per_head", "input_weighted", "sum")
        )
        _require_choice(self, "implementation", (None, "scan", "mosaic_gpu"))
        _require_choice(self, "dtype", (None, "float32", "bfloat16", "float64"))
        n_value = self.n_state * self.expansion
        if not math.isfinite(n_value) or n_value < 1 or n_value != int(n_value):
            raise ValueError(
                f"expansion * n_state must be a whole number of columns, at least 1; "
                f"got {self.expansion} * {self.n_state} = {n_value}."
            )
        if self.tie_kv and self.expansion != 1:
            raise ValueError(
                f"tie_kv uses keys as values and needs expansion = 1, got {self.expansion}."
            )
        if self.conv_size is not None and self.conv_size < 2:
            raise ValueError(f"conv_size must be None or at least 2 taps, got {self.conv_size}.")

    @property
    def n_value(self) -> int:
        """V: length of a value, columns of the state."""
        return int(self.n_state * self.expansion)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model (`E88LM`): `depth` identical layers between an embedding and its transpose.

    Raises:
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
        _require_positive(self, "depth", "vocab_size")
        _require_choice(self, "remat", ("none", "recurrence", "layer"))
        if self.channel_mixer_dim is not None:
            _require_positive(self, "channel_mixer_dim")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LMConfig":
        """The configuration that `to_dict` wrote.

        Raises:
            KeyError: no `layer`.
            TypeError: another field is missing or unknown.
            ValueError: values that contradict each other.
        """
        return cls(**{**values, "layer": E88Config(**values["layer"])})
