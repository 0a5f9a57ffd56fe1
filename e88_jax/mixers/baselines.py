"""Configurations of the mixers that E88 is compared with: plain data that imports no JAX.

The layers are in files of their own: `gated_deltanet.py`, `mamba2.py`, `attention.py`, `lstm.py`.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Self

from e88_jax.checks import check_fields, require_bool, require_divisor, require_int, require_number
from e88_jax.mixers import activations
from e88_jax.mixers.base import MATMUL_FLOPS, Activations, Execution, Flops

if TYPE_CHECKING:
    from flax import nnx

    from e88_jax.mixers.attention import AttentionMixer
    from e88_jax.mixers.gated_deltanet import GatedDeltaNetMixer
    from e88_jax.mixers.lstm import LSTMMixer
    from e88_jax.mixers.mamba2 import Mamba2Mixer

DELTA_RULE_FLOPS = 8 + 16
"""FLOPs of training per state element and step of the gated delta rule, token by token; a
multiply-add is two. Forward: the read S^T k (2), the decayed state (1), the write k d^T (2 with its
sum), the output S^T q (2), the decay of the read (1). Backward: two for each of the forward's
multiply-adds."""
SSD_FLOPS = 5 + 10
"""The same of state-space duality: the decay (1), the write B x^T (2), the output S^T C (2)."""
LSTM_FLOPS = 9 + 22
"""FLOPs of training per unit and step of the LSTM outside of its matmuls. Forward: five activations
(5), f c + i g (3), o tanh(c) (1). Backward: the gradients of o, tanh(c), f, c, i and g with their
sum at c (7), through the five activations (15)."""
MEAN_CONTEXT = 1024
"""Tokens that attention without a window sees on average, for its FLOPs: half of 2,048."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """One Gated DeltaNet layer (`GatedDeltaNetMixer`; `docs/references.md`). Sizes are in elements.

    Raises:
        TypeError: a field of another type.
        ValueError: a size out of range, or sizes that do not go together.
    """

    kind: ClassVar[str] = "gated_deltanet"

    n_heads: int
    """Heads of q and k. The authors take n_heads * head_dim = 0.75 dim, which makes a layer of
    about 6 dim^2 parameters."""
    head_dim: int = 256
    """K: length of a key, rows of a head's state."""
    expand_v: float = 2.0
    """V / K: columns of a head's state over its rows."""
    n_value_heads: int | None = None
    """Heads of v and of the state, a multiple of n_heads; heads of q and k are shared between them.
    None for n_heads."""
    conv_size: int = 4
    """Taps of the causal depthwise convolutions on q, k and v."""
    negative_eigenvalues: bool = False
    """Let the write gate reach 2 instead of 1, so that a step can turn a direction's sign."""

    def __post_init__(self) -> None:
        check_fields(self, require_int, "n_heads", "head_dim")
        check_fields(self, require_int, "conv_size", minimum=2)
        check_fields(self, require_number, "expand_v")
        check_fields(self, require_bool, "negative_eigenvalues")
        value_dim = self.head_dim * self.expand_v
        if value_dim < 1 or value_dim != int(value_dim):
            raise ValueError(
                f"expand_v * head_dim must be a whole number of columns, at least 1; "
                f"got {self.expand_v} * {self.head_dim} = {value_dim}."
            )
        if self.n_value_heads is not None:
            check_fields(self, require_int, "n_value_heads")
            if self.n_value_heads % self.n_heads:
                raise ValueError(
                    f"n_value_heads must be a multiple of n_heads, {self.n_heads}, "
                    f"got {self.n_value_heads}."
                )

    @property
    def value_heads(self) -> int:
        """HV: heads of v and of the state."""
        return self.n_value_heads or self.n_heads

    @property
    def value_dim(self) -> int:
        """V: length of a value, columns of a head's state."""
        return int(self.head_dim * self.expand_v)

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "GatedDeltaNetMixer":
        """A layer with new weights."""
        from e88_jax.mixers.gated_deltanet import GatedDeltaNetMixer

        return GatedDeltaNetMixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        """Parameters of the layer, exactly."""
        keys, values = self.n_heads * self.head_dim, self.value_heads * self.value_dim
        streams = 2 * keys + values
        matmuls = dim * (streams + 2 * self.value_heads + values) + values * dim
        return matmuls + self.conv_size * streams + 2 * self.value_heads + self.value_dim

    def state_size(self, dim: int) -> int:
        """Elements of the recurrent state of one sequence, HV * K * V; the convolutions' state is
        not counted."""
        return self.value_heads * self.head_dim * self.value_dim

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token, the recurrence's as if run token by token. Every
        parameter counts as a weight of a matmul; all but one in a hundred are."""
        recurrence = DELTA_RULE_FLOPS * self.state_size(dim)
        return Flops(MATMUL_FLOPS * self.count_params(dim), recurrence)

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that the layer keeps for the backward pass, as `EstimatesMemory` has it."""
        sizes = self.n_heads, self.value_heads, self.head_dim, self.value_dim
        return activations.gated_deltanet(activations.Sizes(*sizes), length, execution)

    def divided(self, n: int, dim: int) -> Self:
        """The layer of a device that has one of n parts of the heads, as `DividesHeads` has it."""
        require_divisor("n_heads", self.n_heads, "heads", n)
        values = None if self.n_value_heads is None else self.n_value_heads // n
        return dataclasses.replace(self, n_heads=self.n_heads // n, n_value_heads=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """One Mamba2 layer (`Mamba2Mixer`; `docs/references.md`). Sizes are in elements.

    Raises:
        TypeError: a field of another type.
        ValueError: a size out of range; of sizes that do not go with the model's dim, when the
            layer is counted or built.
    """

    kind: ClassVar[str] = "mamba2"

    expand: float = 2.0
    """d_inner / dim: channels of the state-space model over the width of the residual stream."""
    d_state: int = 128
    """N: rows of a head's state."""
    head_dim: int = 64
    """P: channels of a head, columns of its state; d_inner is a multiple of it."""
    n_groups: int = 1
    """Groups of heads, each with its own B and C; a divisor of the number of heads."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on x, B and C."""

    def __post_init__(self) -> None:
        check_fields(self, require_number, "expand")
        check_fields(self, require_int, "d_state", "head_dim", "n_groups")
        check_fields(self, require_int, "conv_size", minimum=2)

    def d_inner(self, dim: int) -> int:
        """Channels of the state-space model, H * P.

        Raises:
            ValueError: expand * dim is no multiple of head_dim, or the heads no multiple of the
                groups.
        """
        inner = round(self.expand * dim, 6)  # a third of the heads is a whole number too
        if inner < 1 or inner != int(inner) or int(inner) % self.head_dim:
            raise ValueError(
                f"expand * dim must be a multiple of head_dim, {self.head_dim}; "
                f"got {self.expand} * {dim} = {inner:g}."
            )
        heads = int(inner) // self.head_dim
        if heads % self.n_groups:
            raise ValueError(
                f"expand * dim / head_dim, the number of heads, must be a multiple of n_groups, "
                f"{self.n_groups}; got {heads}."
            )
        return int(inner)

    def n_heads(self, dim: int) -> int:
        """H: heads, each with a state `[N, P]`.

        Raises:
            ValueError: as `d_inner`.
        """
        return self.d_inner(dim) // self.head_dim

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "Mamba2Mixer":
        """A layer with new weights."""
        from e88_jax.mixers.mamba2 import Mamba2Mixer

        return Mamba2Mixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        """Parameters of the layer, exactly."""
        inner, heads = self.d_inner(dim), self.n_heads(dim)
        convolved = inner + 2 * self.n_groups * self.d_state
        matmuls = dim * (inner + convolved + heads) + inner * dim
        return matmuls + (self.conv_size + 1) * convolved + 3 * heads + inner

    def state_size(self, dim: int) -> int:
        """Elements of the recurrent state of one sequence, d_inner * N; the convolution's state is
        not counted."""
        return self.d_inner(dim) * self.d_state

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token, the recurrence's as if run token by token. Every
        parameter counts as a weight of a matmul; all but one in a hundred are."""
        recurrence = SSD_FLOPS * self.state_size(dim)
        return Flops(MATMUL_FLOPS * self.count_params(dim), recurrence)

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that the layer keeps for the backward pass, as `EstimatesMemory` has it."""
        sizes = self.n_groups, self.n_heads(dim), self.d_state, self.head_dim
        return activations.mamba2(activations.Sizes(*sizes), length, execution)

    def divided(self, n: int, dim: int) -> Self:
        """The layer of a device that has one of n parts of the heads, as `DividesHeads` has it; its
        groups are whole, as B, C and the norm are those of all heads of a group."""
        if self.n_groups % n:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide over heads={n}: a multiple of {n} would."
            )
        groups = self.n_groups // n
        return dataclasses.replace(self, expand=self.d_inner(dim) / n / dim, n_groups=groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One layer of causal softmax attention (`AttentionMixer`). Sizes are in elements.

    Raises:
        TypeError: a field of another type.
        ValueError: a size out of range, or sizes that do not go together.
    """

    kind: ClassVar[str] = "attention"

    n_heads: int
    """Heads of queries."""
    head_dim: int = 64
    """Length of a query, key and value; even, as RoPE turns pairs."""
    n_kv_heads: int | None = None
    """Heads of keys and values, a divisor of n_heads, each shared by as many heads of queries. None
    for n_heads."""
    qk_norm: bool = True
    """RMS-normalise each query and key, with a learned weight, before RoPE."""
    window: int | None = None
    """Tokens that a token sees, itself among them; None for all before it."""
    rope_base: float = 10_000.0
    """Base of RoPE's wavelengths."""

    def __post_init__(self) -> None:
        check_fields(self, require_int, "n_heads")
        check_fields(self, require_int, "head_dim", minimum=2)
        check_fields(self, require_bool, "qk_norm")
        check_fields(self, require_number, "rope_base")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for RoPE, got {self.head_dim}.")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base must be above 1, got {self.rope_base}.")
        if self.n_kv_heads is not None:
            check_fields(self, require_int, "n_kv_heads")
            if self.n_heads % self.n_kv_heads:
                raise ValueError(
                    f"n_kv_heads must divide n_heads, {self.n_heads}, got {self.n_kv_heads}."
                )
        if self.window is not None:
            check_fields(self, require_int, "window")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "AttentionMixer":
        """A layer with new weights."""
        from e88_jax.mixers.attention import AttentionMixer

        return AttentionMixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        """Parameters of the layer, exactly."""
        columns = self.head_dim * (2 * self.n_heads + 2 * self.kv_heads)
        return dim * columns + (2 * self.head_dim if self.qk_norm else 0)

    def state_size(self, dim: int) -> int:
        """Elements of the keys and values of one sequence that a window keeps, window * 2 * heads *
        head_dim; without a window, of each token."""
        return 2 * (self.window or 1) * self.kv_heads * self.head_dim

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token. Every parameter counts as a weight of a matmul; the
        recurrence's are those of scores and weighted values, forward and backward, over the window,
        or without one over 1,024 tokens, the mean of a sequence of 2,048."""
        seen = self.window or MEAN_CONTEXT
        scores = 3 * 2 * 2 * self.n_heads * self.head_dim * seen
        return Flops(MATMUL_FLOPS * self.count_params(dim), scores)

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that the layer keeps for the backward pass, as `EstimatesMemory` has it."""
        sizes = self.n_heads * self.head_dim, self.kv_heads * self.head_dim, self.n_heads
        fused = self.head_dim <= 128 and self.head_dim % 8 == 0
        return activations.attention(*sizes, self.qk_norm, length, execution, fused)

    def divided(self, n: int, dim: int) -> Self:
        """The layer of a device that has one of n parts of the heads, as `DividesHeads` has it."""
        require_divisor("n_heads", self.n_heads, "heads", n)
        require_divisor("n_kv_heads", self.kv_heads, "heads", n)
        keys = None if self.n_kv_heads is None else self.n_kv_heads // n
        return dataclasses.replace(self, n_heads=self.n_heads // n, n_kv_heads=keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """One LSTM layer (`LSTMMixer`): the control with a nonlinear vector state.

    Raises:
        TypeError: a field of another type.
        ValueError: a size below 1.
    """

    kind: ClassVar[str] = "lstm"

    width: int
    """Units, each with a cell and an output."""

    def __post_init__(self) -> None:
        check_fields(self, require_int, "width")

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "LSTMMixer":
        """A layer with new weights."""
        from e88_jax.mixers.lstm import LSTMMixer

        return LSTMMixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        """Parameters of the layer, exactly: four gates from input and output, biases, and the
        output projection."""
        return 4 * self.width * (dim + self.width + 1) + self.width * dim

    def state_size(self, dim: int) -> int:
        """Elements of the state of one sequence: cells and outputs."""
        return 2 * self.width

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token. Every parameter counts as a weight of a matmul, the
        recurrent weights among them; the recurrence's are those of gates and cells."""
        return Flops(MATMUL_FLOPS * self.count_params(dim), LSTM_FLOPS * self.width)

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that the layer keeps for the backward pass, as `EstimatesMemory` has it."""
        return activations.lstm(self.width)
