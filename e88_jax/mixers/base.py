"""Protocols of mixers and their configurations, and options of execution. Imports no JAX."""

import dataclasses
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    get_args,
    runtime_checkable,
)

from e88_jax.checks import check_fields, require_choice, require_int

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "recurrence", "layer"]
Implementation = Literal["scan", "chunked", "mosaic_gpu"]

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float64": 8}

MixerState = Any
"""A tree of arrays whose first axis is the batch; each mixer has its own."""


def _dtype_name(dtype: object) -> object:
    """The name of a NumPy or JAX dtype; anything else as it is."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    return name if isinstance(name, str) else dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Options of running a model: parameters do not depend on them, results only by rounding.

    Raises:
        TypeError: a field of another type.
        ValueError: a number below 1, or an unknown choice.
    """

    dtype: Dtype | None = None
    """Compute dtype of the matmuls; None for bfloat16 on a GPU and float32 elsewhere. A dtype of
    NumPy or JAX, such as `jnp.bfloat16`, is stored as its name."""
    implementation: Implementation | None = None
    """Implementation of the mixers' recurrences; None for the fastest that takes the call."""
    saved_state_interval: int = 32
    """Steps between E88's states that are saved for the backward pass."""
    remat: Remat = "none"
    """Recomputed in the backward pass instead of kept: nothing, everything but matmuls (the
    recurrence with its saved states among it), or whole layers."""
    time_chunks: int = 1
    """Chunks of time that sequences are cut into where the number divides their length: a layer
    runs a chunk beside the layer below it, which runs the next chunk. The recurrence then has n
    times as many rows, of a part of the steps each: faster where a GPU has fewer rows times heads
    than SMs. All layers must be of one configuration."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        choices = (None, *get_args(Implementation))
        check_fields(self, require_choice, "dtype", choices=(None, *get_args(Dtype)))
        check_fields(self, require_choice, "implementation", choices=choices)
        check_fields(self, require_int, "saved_state_interval", "time_chunks")
        check_fields(self, require_choice, "remat", choices=get_args(Remat))


MATMUL_FLOPS = 6
"""FLOPs of training per weight of a matmul and token: 2 forward, 4 backward (Scaling Laws, section
2.1: `docs/references.md`)."""


class Flops(NamedTuple):
    """Floating-point operations of one token's forward and backward pass."""

    matmul: int
    recurrence: int
    """FLOPs of the state's update and reads, which run outside of matmuls."""

    @property
    def total(self) -> int:
        return self.matmul + self.recurrence


class Activations(NamedTuple):
    """Bytes that one layer's mixer leaves from the forward to the backward pass, on a GPU.

    The mixer's input is not among them: the norm before it is the model's.
    """

    matmuls: int
    """Outputs of matmuls, per token; `remat="recurrence"` keeps these alone."""
    others: int
    """Other arrays, per token."""
    saved_states: int
    """States and what else is saved once in a while, per sequence."""
    working: int = 0
    """Temporary arrays of the mixer's backward pass beyond the kept ones, per token."""


class MixerConfig(Protocol):
    """A frozen dataclass of plain values, which are the mixer's flags on the command line.

    `dim`, the width of the residual stream, is the model's and given to each method.
    """

    kind: ClassVar[str]
    """The mixer's name in `mixers.MIXERS`, on the command line and in JSON."""
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, dim: int, execution: Execution, *, rngs: "nnx.Rngs") -> "Mixer":
        """A mixer of this configuration with new weights."""
        ...

    def count_params(self, dim: int) -> int:
        """Number of parameters, exactly."""
        ...

    def state_size(self, dim: int) -> int:
        """Elements of the state of one sequence."""
        ...

    def flops_per_token(self, dim: int) -> Flops:
        """FLOPs of training on one token."""
        ...


@runtime_checkable
class EstimatesMemory(Protocol):
    """A mixer's configuration that `sizing.training_memory` can estimate."""

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        """Bytes that a layer keeps for the backward pass.

        Args:
            dim: the model's.
            length: tokens of a sequence.
            execution: its dtype and implementation are set. Where the mixer lacks "mosaic_gpu",
                "chunked" runs, and where it lacks that, "scan".
        """
        ...


@runtime_checkable
class DividesHeads(Protocol):
    """A mixer's configuration whose heads can be divided over devices. The type of the layer's
    states has `AXES`, such as `E88State.AXES`, for states that are carried from step to step."""

    def divided(self, n: int, dim: int) -> Self:
        """The layer of a device that has one of n parts of the heads. The sum of such layers'
        outputs is that of the whole layer, where the parameters of each are its part along the axes
        named "heads", and copies of the others.

        Args:
            n: number of parts.
            dim: the model's.

        Raises:
            ValueError: n does not divide the heads, or the layer needs all of them at once.
        """
        ...


class Mixer(Protocol):
    """An `nnx.Module` that mixes over time: `y, state = mixer(x, state, segment_ids)`.

    Its matmuls' weights are parameters named `kernel`; `optim.py` reads from that name which
    parameters decay and which Muon takes.

    A mixer whose state is as large as its `context`, such as attention without a window, has two
    members more: `needs_context`, whether `init_state` needs one, and `context_of(state)`, that
    with which `init_state` makes a state of the same size.
    """

    def __call__(
        self,
        x: "Array",
        state: MixerState | None = None,
        segment_ids: "Array | None" = None,
        *,
        lengths: "Array | None" = None,
    ) -> "tuple[Array, MixerState]":
        """Outputs `[B, T, dim]` of x `[B, T, dim]`, and the state after the last token.

        Args:
            x: the input.
            state: what the call before returned; None is `init_state(B)`.
            segment_ids: packed documents, `[B, T]` int32: where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32: the state is that after a row's own last
                token. Given for prompts of different lengths only.
        """
        ...

    def init_state(self, batch: int, context: int | None = None) -> MixerState:
        """The state before the first token.

        Args:
            batch: rows.
            context: most tokens that attention without a window remembers; other mixers ignore it.
        """
        ...

    def for_inference(self) -> Self:
        """A mixer of the same call whose weights are laid out for decoding; self is untouched."""
        ...
