"""Configurations of the E88 layer and of a language model: plain data that imports no JAX."""

import dataclasses
from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

from e88_jax import mixers
from e88_jax.checks import (
    LARGEST_INT,
    check_fields,
    require_bool,
    require_choice,
    require_divisor,
    require_instance,
    require_int,
    require_number,
    shown,
)
from e88_jax.mixers.base import (
    DTYPE_BYTES,
    MATMUL_FLOPS,
    Activations,
    DividesHeads,
    Execution,
    Flops,
    MixerConfig,
)
from pallas_kernels.limits import MAX_GROUPED_INTERVAL, SAVED_STATE_GROUP, takes_size

if TYPE_CHECKING:
    from flax import nnx

    from e88_jax.mixers.e88 import E88Mixer

OutputGate = Literal["silu", "sigmoid", "none"]
DecayMode = Literal["mamba", "simple", "constant", "none"]
HeadMix = Literal["concat", "weighted_sum", "per_head", "input_weighted", "sum"]

RECURRENCE_FLOPS = 8 + 18
"""FLOPs of training per state element and step; a multiply-add is two. Forward: the read S^T k (2),
decay * S + k d^T (3), tanh (1), the output S^T q (2). Backward: q d_out^T (2), d_q (2), d_k (4),
d_decay (2), d_v (2), (1 - S^2) * dS (3), the gradient of the state before (3). Recomputation in the
backward pass is not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class E88Config:
    """One E88 layer (`E88Mixer`). Sizes are in elements.

    Fields are stored as plain Python values: NumPy's integers, floats and bools are taken too.

    Raises:
        TypeError: a field of another type.
        ValueError: a size out of range, an unknown choice, or options that contradict each other.
    """

    kind: ClassVar[str] = "e88"

    n_heads: int
    """Heads; each has a state matrix of its own."""
    n_state: int = 32
    """N: length of a key, rows of the state."""
    expansion: float = 1.0
    """V / N: columns of the state over its rows."""
    output_gate: OutputGate = "silu"
    """Activation of the gate that multiplies the heads' outputs."""
    decay_mode: DecayMode = "mamba"
    """Decay from the input and a learned rate (mamba), from the input alone (simple), from one
    learned number per head (constant), or 1 (none)."""
    write_gate: bool = False
    """Scale each write by a sigmoid of the input, per head."""
    write_gate_scale: float = 1.0
    """Greatest value of the write gate; at 2 a step can reflect the state: with decay 1 its linear
    part is then I - 2 k k^T for a key of unit length."""
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

    def __post_init__(self) -> None:
        check_fields(self, require_int, "n_heads", "n_state")
        check_fields(self, require_number, "expansion", "write_gate_scale")
        check_fields(self, require_bool, "write_gate", "linear_state", "output_norm")
        check_fields(self, require_bool, "value_residual", "tie_kv", "use_silu", "use_l2_norm")
        check_fields(self, require_choice, "output_gate", choices=get_args(OutputGate))
        check_fields(self, require_choice, "decay_mode", choices=get_args(DecayMode))
        check_fields(self, require_choice, "head_mix", choices=get_args(HeadMix))
        if self.conv_size is not None:
            check_fields(self, require_int, "conv_size", minimum=2)
        n_value = self.n_state * self.expansion
        if not 1 <= n_value <= LARGEST_INT or n_value != int(n_value):
            raise ValueError(
                f"expansion * n_state must be a whole number of columns, at least 1; "
                f"got {self.expansion} * {self.n_state} = {n_value}."
            )
        if self.write_gate_scale <= 0:
            raise ValueError(f"write_gate_scale must be above 0, got {self.write_gate_scale}.")
        if self.write_gate_scale != 1 and not self.write_gate:
            raise ValueError(
                f"write_gate_scale {self.write_gate_scale} needs write_gate, which is off."
            )
        if self.tie_kv and self.expansion != 1:
            raise ValueError(
                f"tie_kv uses keys as values and needs expansion = 1, got {self.expansion}."
            )

    @property
    def n_value(self) -> int:
        """V: length of a value, columns of the state."""
        return int(self.n_state * self.expansion)

    @property
    def head_columns(self) -> int:
        """Columns of a head's q, k and, unless tied, v."""
        return 2 * self.n_state + (0 if self.tie_kv else self.n_value)

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "E88Mixer":
        """A layer with new weights."""
        from e88_jax.mixers.e88 import E88Mixer

        return E88Mixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        """Parameters of the layer, exactly, with every option.

        Without the output gate a default layer has `dim * d_inner` less, a fifth.
        """
        heads, n_value = self.n_heads, self.n_value
        values = heads * n_value
        total = dim * heads * self.head_columns
        if self.conv_size is not None:
            total += self.conv_size * heads * self.head_columns
        total += {
            "mamba": dim * heads + 2 * heads,
            "simple": dim * heads,
            "constant": heads,
            "none": 0,
        }[self.decay_mode]
        if self.write_gate:
            total += dim * heads
        if self.value_residual:
            total += values
        if self.output_norm:
            total += n_value
        if self.output_gate != "none":
            total += dim * values
        total += {
            "concat": dim * values,
            "per_head": dim * values,
            "weighted_sum": heads + dim * n_value,
            "input_weighted": dim * heads + dim * n_value,
            "sum": dim * n_value,
        }[self.head_mix]
        return total

    def state_size(self, dim: int) -> int:
        """Elements of the recurrent state of one sequence, H * N * V; the short convolution's state
        is not counted."""
        return self.n_heads * self.n_state * self.n_value

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token. Every parameter counts as a weight of a matmul; all but
        one in a thousand are."""
        recurrence = RECURRENCE_FLOPS * self.state_size(dim)
        return Flops(MATMUL_FLOPS * self.count_params(dim), recurrence)

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that the layer keeps for the backward pass, as `EstimatesMemory` has it. XLA
        recomputes what is elementwise where it reads it."""
        narrow, wide = DTYPE_BYTES[execution.dtype or "float32"], DTYPE_BYTES["float32"]
        interval = execution.saved_state_interval
        kernels = execution.implementation == "mosaic_gpu"
        kernels = kernels and takes_size(self.n_state) and takes_size(self.n_value)
        grouped = kernels and interval <= MAX_GROUPED_INTERVAL

        keys, values = self.n_heads * self.n_state, self.n_heads * self.n_value
        streams, gated = self.n_heads * self.head_columns, self.output_gate != "none"
        per_head = self.decay_mode in ("mamba", "simple")
        per_head += self.write_gate + (self.head_mix == "input_weighted")
        matmuls = streams + (values if gated else 0) + per_head * self.n_heads
        others = narrow * (2 * keys + values)  # q, k and out of the recurrence
        # v, or the kernel's delta; XLA copies what a loop reads.
        others += wide * values if grouped else narrow * (2 * keys + 2 * values)
        if self.use_l2_norm:
            others += wide * 2 * self.n_heads
        if self.conv_size is not None:
            others += narrow * streams
        whole_heads = self.head_mix in ("concat", "per_head")
        if gated or not whole_heads:  # what the output projection reads
            others += narrow * (values if whole_heads else self.n_value)

        states = ceil(length / (SAVED_STATE_GROUP if grouped else interval))
        saved = (narrow if kernels else wide) * states * self.state_size(dim)
        return Activations(narrow * matmuls, others, saved)

    def divided(self, n: int, dim: int) -> Self:
        """The layer of a device that has one of n parts of the heads, as `DividesHeads` has it."""
        if self.head_mix in ("weighted_sum", "input_weighted"):
            raise ValueError(
                f"head_mix {self.head_mix} weights the heads against each other, so that they do "
                f"not divide over heads={n}: concat, per_head and sum do."
            )
        require_divisor("n_heads", self.n_heads, "heads", n)
        return dataclasses.replace(self, n_heads=self.n_heads // n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model (`LanguageModel`): mixers between an embedding and its transpose.

    Raises:
        TypeError: a field of another type.
        ValueError: a size below 1, no layers, or more of them than `depth`, or layers of several
            configurations with chunks of time.
    """

    dim: int
    """Width of the residual stream."""
    depth: int
    """Number of layers."""
    layers: tuple[MixerConfig, ...]
    """Mixer configurations, repeated in order over the `depth` layers."""
    vocab_size: int = 256
    """Token ids run from 0 to vocab_size - 1; 256 for bytes."""
    channel_mixer_dim: int | None = None
    """Hidden width of a SwiGLU channel mixer after each layer's mixer; None for none."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding. Layers write numbers near 1, so at 0.02 they
    drown the token at first: on small tasks of recall 1 trains far better."""
    execution: Execution = Execution()  # noqa: RUF009  (frozen)
    """Options of running the model, which do not change its parameters."""

    def __post_init__(self) -> None:
        check_fields(self, require_int, "dim", "depth", "vocab_size")
        if self.channel_mixer_dim is not None:
            check_fields(self, require_int, "channel_mixer_dim")
        check_fields(self, require_number, "embedding_std")
        if self.embedding_std <= 0:
            raise ValueError(f"embedding_std must be above 0, got {self.embedding_std}.")
        require_instance("execution", self.execution, Execution)
        kinds = ", ".join(mixers.MIXERS)
        needs = f"a tuple of mixers' configurations, of kinds such as {kinds}"
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        require_instance("layers", self.layers, tuple, needs)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, type) or not isinstance(getattr(layer, "kind", None), str):
                raise TypeError(
                    f"layers[{i}] must be a mixer's configuration, of a kind such as {kinds}, "
                    f"got {shown(layer)}."
                )
        if not 1 <= len(self.layers) <= self.depth:
            raise ValueError(
                f"layers must be from 1 to the depth, {self.depth}, got {len(self.layers)}."
            )
        if self.execution.time_chunks > 1 and len(set(self.layers)) > 1:
            raise ValueError(
                f"time_chunks {self.execution.time_chunks} needs layers of one configuration, got "
                f"{len(set(self.layers))}."
            )

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer, first layer first."""
        return tuple(self.layers[i % len(self.layers)] for i in range(self.depth))

    def count_params(self) -> int:
        """Parameters of `LanguageModel(config)`, exactly, without building it.

        The sizing guide's formula (`sizing.calc_e88_params`) gives 0.3 to 0.6 % less: it leaves out
        the decay projection, `A_log` and `dt_bias` of each layer, and counts two vectors per norm.
        """
        block = self.dim
        if self.channel_mixer_dim is not None:
            block += self.dim + 3 * self.dim * self.channel_mixer_dim
        own = self.vocab_size * self.dim + self.depth * block + self.dim
        return own + sum(mixer.count_params(self.dim) for mixer in self.mixers)

    def state_size(self) -> int:
        """Elements of the recurrent states of all layers, for one sequence."""
        return sum(mixer.state_size(self.dim) for mixer in self.mixers)

    def flops_per_token(self) -> Flops:
        """FLOPs of training on one token.

        Every parameter outside of mixers counts as a weight of a matmul; the embedding is one, as
        the logits' transposed weights.
        """
        of_mixers = [mixer.flops_per_token(self.dim) for mixer in self.mixers]
        rest = self.count_params() - sum(mixer.count_params(self.dim) for mixer in self.mixers)
        matmul = MATMUL_FLOPS * rest + sum(flops.matmul for flops in of_mixers)
        return Flops(matmul, sum(flops.recurrence for flops in of_mixers))

    def divided(self, n: int) -> "LMConfig":
        """The model of a device that has one of n parts of each layer's heads, and of a channel
        mixer's hidden units; `head_parallel.merge` builds it.

        Raises:
            ValueError: they do not divide, or a layer has no heads.
        """
        for layer in self.layers:
            if not isinstance(layer, DividesHeads):
                raise ValueError(f"{layer.kind} layers have no heads to divide over heads={n}.")
        layers = tuple(cast(DividesHeads, x).divided(n, self.dim) for x in self.layers)
        hidden = self.channel_mixer_dim
        if hidden is not None:
            require_divisor("channel_mixer_dim", hidden, "heads", n)
            hidden //= n
        return dataclasses.replace(self, layers=layers, channel_mixer_dim=hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON, each layer with its `kind`; `from_dict` reads it back."""
        layers = [{"kind": layer.kind, **dataclasses.asdict(layer)} for layer in self.layers]
        return {**dataclasses.asdict(self), "layers": layers}

    @classmethod
    def from_dict(cls, values: Any) -> "LMConfig":
        """The configuration that `to_dict` wrote. Fields with a default may be missing.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of range; the message
                names it.
        """
        what = "the model's configuration"
        fields = _fields(values, what)
        if "execution" in fields:
            fields["execution"] = _read(Execution, fields["execution"], "execution")
        if isinstance(fields.get("layers"), list | tuple):
            fields["layers"] = tuple(_read_layer(x, i) for i, x in enumerate(fields["layers"]))
        return _read(cls, fields, what)


def _fields(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a dictionary of fields, got {shown(values)}.")
    return dict(cast("Mapping[str, Any]", values))


def _read_layer(values: Any, index: int) -> MixerConfig:
    """A mixer's configuration from its kind and fields."""
    what = f"layers[{index}]"
    fields = _fields(values, what)
    if "kind" not in fields:
        raise ValueError(f"{what} lacks kind.")
    try:
        config_type = mixers.config_type(fields.pop("kind"))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return _read(config_type, fields, what)


def _read(kind: type, values: Any, what: str) -> Any:
    """A configuration from its fields by name."""
    values = _fields(values, what)
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
