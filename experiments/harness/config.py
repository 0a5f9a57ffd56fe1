"""Configuration of a training run; its fields are the flags of the training programs."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from experiments.cli import FLOAT32_LIMIT, INT32_LIMIT, field_types, require
from experiments.cli.errors import UsageError
from experiments.cli.model_flags import changed_layers
from experiments.cli.names import flag_of
from experiments.tasks.base import Task, TaskConfig

from .launch import LaunchConfig
from .mesh_sizes import AUTO, nearest_multiples, parse_mesh

# The backward pass recomputes less with more saved states, whose memory is small at this size.
DEFAULT_MODEL = LMConfig(
    dim=256,
    depth=4,
    layers=(E88Config(n_heads=8, n_state=32),),
    execution=Execution(saved_state_interval=8),
)
"""Model that learns bytes on a laptop's CPU in minutes."""

_BELOW_ONE = 1 - 2**-24
"""The largest number below 1 in float32."""
MOST_PARAMETERS = 10**10
"""Limit of the trainer, far above what a device holds: a larger number is a mistyped size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Tokens of a training step, and the seed."""

    seq_len: int = 256
    """Window: tokens that one gradient reaches back."""
    batch_size: int = 8
    """Windows in one forward and backward pass."""
    accumulate: int = 1
    """Passes whose gradients are averaged into one step."""
    stateful: bool = False
    """Read consecutive windows and carry the state from one to the next; gradients stop at the
    window, and attention without a window of its own remembers --seq-len tokens. Otherwise windows
    are random and start from a zero state."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    def __post_init__(self) -> None:
        require(self, "seq_len", "batch_size", "accumulate", minimum=1)
        require(self, "seed", minimum=0, below=2**32)
        n_tokens = self.accumulate * self.batch_size * (self.seq_len + 1)
        if n_tokens >= INT32_LIMIT:
            raise ValueError(
                f"--accumulate {self.accumulate}, --batch-size {self.batch_size} and --seq-len "
                f"{self.seq_len} make {n_tokens:,} tokens a step, which must be below 2**31."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Passes and rows of a step."""
        return self.accumulate, self.batch_size

    @property
    def carry_shape(self) -> tuple[int, int] | None:
        """Passes and rows whose state is carried from step to step; None unless stateful."""
        return self.shape if self.stateful else None


def check_chunks(seq_len: int, model: LMConfig) -> None:
    """Raises ValueError, with the nearest lengths that would do, if windows of so many tokens do
    not divide into the model's chunks of time, so that it would not use them."""
    n = model.execution.time_chunks
    if seq_len % n:
        raise ValueError(
            f"--seq-len {seq_len} does not divide into --time-chunks {n}: "
            f"{nearest_multiples(seq_len, n)} would."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rate and clipping."""

    optimizer: Literal["adamw", "schedule_free", "muon"] = "adamw"
    """AdamW or Muon with warm-up and cosine decay, or schedule-free AdamW at a constant rate."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps over which the rate rises from 0."""
    final_lr_fraction: float = 0.1
    """Rate at the end of the cosine, over the peak."""
    weight_decay: float = 0.1
    """Decay of the weights of projections, convolutions and embedding, times the rate."""
    beta1: float = 0.9
    """Decay of the mean of the gradient (of schedule-free's interpolation); Muon's matrices have
    0.95."""
    beta2: float = 0.95
    """Decay of the mean of the squared gradient."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; larger ones are scaled down."""
    max_skipped_steps: int = 20
    """Stop after so many steps in a row whose loss or gradient is not finite (such a step changes
    nothing), counted at each --log-every."""

    def __post_init__(self) -> None:
        require(self, "max_skipped_steps", minimum=1)
        require(self, "warmup_steps", minimum=0)
        require(self, "beta1", "beta2", above=0, below=_BELOW_ONE)
        require(self, "learning_rate", "clip_norm", above=0, below=FLOAT32_LIMIT)
        require(self, "final_lr_fraction", "weight_decay", minimum=0, below=FLOAT32_LIMIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags of any training run. A program's own class gives `task` a type and a default."""

    out: Path | None = None
    """Directory of the run; by default a new one under runs/, with --resume the newest there."""
    resume: bool = False
    """Continue the run in --out where its last checkpoint left it, with the flags it had."""
    steps: int = 600
    """Updates of the weights, counted from the start of the run. More on --resume lengthens the
    cosine of the learning rate."""
    log_every: int = 10
    """Steps between lines of progress and of metrics.jsonl."""
    eval_every: int = 100
    """Steps between evaluations on the validation data."""
    save_every: int = 100
    """Steps between checkpoints; one is also written for each best evaluation and at the end."""
    keep: int = 2
    """Newest checkpoints kept, besides the best."""
    preset: str | None = None
    """Take a model of the sizing guide, such as h72n32-500m or mamba2-500m; `python -m
    e88_jax.sizing --presets` lists them. Flags of the model change it."""
    params: str | None = None
    """Take the best model of so many parameters, such as 25M, for --gpu. Flags of the model change
    it."""
    gpu: str | None = None
    """GPU for --params, such as h100 or rtx4090; by default the one in this machine."""
    mesh: str = AUTO
    """Devices to train on, such as data=2,fsdp=4: rows are divided over all eight, weights and
    optimizer state over the four of fsdp; heads=2 divides the heads of each layer. auto takes all
    devices that divide the rows, and divides the weights if one device cannot hold them."""
    launch: LaunchConfig = LaunchConfig()  # noqa: RUF009  (frozen)
    task: TaskConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    model: LMConfig = DEFAULT_MODEL

    NAME: ClassVar[str] = "run"
    """Prefix of the names of new directories under runs/."""

    def __post_init__(self) -> None:
        require(self, "steps", "log_every", "eval_every", "save_every", "keep", minimum=1)
        if self.model.execution.dtype == "float64":
            raise ValueError("--dtype float64 is for comparisons; train in float32 or bfloat16.")
        if (n := self.model.count_params()) > MOST_PARAMETERS:
            raise ValueError(
                f"the model of these flags has {n:,} parameters, and {MOST_PARAMETERS:,} are the "
                "most that the trainer takes: choose a smaller --dim, --depth or mixer."
            )
        parse_mesh(self.mesh, self.batch.batch_size)
        check_chunks(self.batch.seq_len, self.model)

    def open_task(self) -> Task:
        """The task; of a resumed run, with the data of the run in `out`.

        Raises:
            UsageError: its data cannot be used, or its vocabulary is not the model's.
        """
        task = self.task.open(self.batch, self.out if self.resume else None)
        if self.model.vocab_size != task.vocab_size:
            raise UsageError(
                f"--vocab-size must be {task.vocab_size}, the vocabulary of the task's "
                f"{task.tokens}; got {self.model.vocab_size}."
            )
        return task

    @classmethod
    def defaults(cls, args: Sequence[str]) -> Self | None:
        """The configuration whose values hold for flags that are not given; None for the class's
        own defaults. `args` is the command line."""
        del args
        return None

    def with_defaults(self, model: LMConfig) -> Self:
        """This configuration with the model that other flags have chosen, whose values hold for
        flags that are not given."""
        return dataclasses.replace(self, model=model)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON, without `launch`, in which processes of a run differ."""
        values = dataclasses.asdict(self)
        del values["launch"]
        out = None if self.out is None else str(self.out)
        return {**values, "out": out, "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: a key is missing or unknown, or a value of another type or out of bounds;
                the message names the key.
        """
        return _read(cls, values)

    @classmethod
    def types_of(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The type of each key that `to_dict` wrote, whose dictionary is `values`."""
        del values
        types = field_types(cls)
        del types["launch"]
        return types


def _read(kind: Any, value: Any, name: str = "the configuration") -> Any:
    """A value of type `kind` (of a field of `TrainConfig`) from plain data."""
    if kind is LMConfig:
        try:
            return LMConfig.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        given = value if isinstance(value, dict) else {}
        types = kind.types_of(given) if issubclass(kind, TrainConfig) else field_types(kind)
        keys = set(given)
        if wrong := sorted(keys ^ types.keys()):
            what = "has no" if wrong[0] in types else "has an unknown"
            raise ValueError(f"{name} {what} {wrong[0]}")
        return kind(**{key: _read(types[key], value[key], key) for key in types})
    if kind is Path and isinstance(value, str):
        return Path(value)
    for choice in get_args(kind) if get_origin(kind) is UnionType else ():
        with contextlib.suppress(ValueError):
            return _read(choice, value, name)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_read(get_args(kind)[0], x, name) for x in value)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    what = kind.__name__ if isinstance(kind, type) else kind
    raise ValueError(f"{name} is {value!r}, which is not of type {what}")


_MAY_CHANGE = {
    *("out", "resume", "steps", "log_every", "eval_every", "save_every", "keep", "mesh"),
    "optimizer.max_skipped_steps",
}
"""Flags that may change when a run is resumed, besides the task's and those of execution."""


def _flatten(values: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted path."""
    if not isinstance(values, dict):
        return {path: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{path}.{name}" if path else name)
    return flat


def check_resumable(stored: TrainConfig, asked: TrainConfig) -> None:
    """Raises UsageError unless a run of configuration `stored` can go on under `asked`."""
    before, now = _flatten(stored.to_dict()), _flatten(asked.to_dict())
    may_change = _MAY_CHANGE | {f"task.{name}" for name in asked.task.MAY_CHANGE}
    differing = {
        flag_of(name.rpartition(".")[2]): (before[name], now.get(name))
        for name in before
        if before[name] != now.get(name)
        and name not in may_change
        and name != "model.layers"
        and not name.startswith("model.execution.")
    }
    differing |= changed_layers(stored.model, asked.model)
    if differing:
        changes = ", ".join(f"{flag} {old} (not {new})" for flag, (old, new) in differing.items())
        raise UsageError(
            f"the run in {asked.out} has another configuration, {changes}: "
            "leave those flags out to resume it, or choose another --out."
        )
