"""Protocol of tasks: batches by step, a metric, validation, an end."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    runtime_checkable,
)

import numpy as np

from experiments.cli.errors import UsageError

if TYPE_CHECKING:
    from jax import Array

    from e88_jax.model import LanguageModel
    from experiments.harness.config import BatchConfig
    from experiments.harness.run import Run


class DataError(UsageError):
    """A batch cannot be read any more; the run stops with a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """The figure of merit of a run: the weighted mean of one value per target, scaled."""

    name: str
    """Key in `metrics.jsonl`, TensorBoard and the checkpoints."""
    unit: str
    """Unit in reports and the plot's axis label, such as "bits per byte"."""
    better: Literal["lower", "higher"]
    scale: float = 1.0
    """Factor of the mean."""
    per_target: "Callable[[Array, Array], Array] | None" = None
    """Value of each target from logits `[rows, N, vocab]` and targets `[rows, N]`, where N is T or
    the number of a batch's positions; None for the cross-entropy in nats, which is the loss."""

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`; any finite one is better than None."""
        if not np.isfinite(value) or best is None:
            return bool(np.isfinite(value))
        return self.rank(value) < self.rank(best)

    def rank(self, value: float) -> float:
        """Lower for better values."""
        return value if self.better == "lower" else -value

    def of_means(self, means: Mapping[str, float]) -> float:
        """The metric from the means of "loss" and, if the metric is not the loss, "score"."""
        return self.scale * means["loss" if self.per_target is None else "score"]


class Batch(NamedTuple):
    """Tokens of one step: NumPy arrays from a task, JAX arrays in the training step."""

    inputs: "np.ndarray | Array"
    """Token ids `[passes, rows, T]`, of any integer dtype."""
    targets: "np.ndarray | Array"
    """Token ids to predict, as `inputs`, or `[passes, rows, N]` at `positions`."""
    weights: "np.ndarray | Array | None"
    """Weight of each target in loss and metric, float32 as `targets`; None for 1. Only their ratios
    count."""
    restart: "bool | np.bool_ | Array"
    """Whether the rows start anew instead of continuing those of the batch before."""
    positions: "np.ndarray | Array | None" = None
    """Tokens that have a target, `[passes, rows, N]` int32: where these are few, the logits of the
    others cost nothing. None: all."""


class Task(Protocol):
    """A data stream to train on. `task[step]` depends on the task's flags and on `step` alone."""

    vocab_size: int
    metric: Metric
    tokens: str
    """Noun for tokens in reports, such as "bytes"."""

    def __getitem__(self, step: int, /) -> Batch:
        """The batch of a step; raises DataError if it cannot be read any more."""
        ...

    def validation(self) -> Sequence[Batch]:
        """The batches of an evaluation: equal shapes, one pass each, in order if stateful."""
        ...

    def fingerprint(self) -> str:
        """Digest of the data: a resumed run must have the same one."""
        ...

    def describe(self) -> str:
        """The data's size in words."""
        ...

    def write(self, directory: Path) -> None:
        """Writes the files by which a resumed run finds the same data."""
        ...

    def finish(self, model: "LanguageModel", run: "Run") -> None:
        """Called with the trained model after the last step."""
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """A task that can read some rows of a batch alone, for a process that needs no others."""

    def read_rows(self, step: int, rows: slice) -> Batch:
        """Part of `task[step]`: its rows in this slice."""
        ...


def rows_of(task: Task, step: int, rows: slice) -> Batch:
    """Part of `task[step]`: its rows in this slice."""
    if isinstance(task, ReadsRows):
        return task.read_rows(step, rows)
    whole = task[step]

    def some(x: "np.ndarray | Array | None") -> "np.ndarray | Array | None":
        return None if x is None else x[:, rows]

    inputs, targets = whole.inputs[:, rows], whole.targets[:, rows]
    return Batch(inputs, targets, some(whole.weights), whole.restart, some(whole.positions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """Flags of a task."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Flags that may change when a run is resumed."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """Names of the files that `Task.write` writes."""

    def located(self, args: Sequence[str]) -> Self:
        """The flags with absolute paths; `args` is the command line.

        Raises:
            UsageError: a path is empty.
        """
        del args
        return self

    @abstractmethod
    def open(self, batch: "BatchConfig", resumed: Path | None) -> Task:
        """The task. Starts no device of JAX, so that mistakes are reported at once.

        Args:
            batch: sizes and seed.
            resumed: directory of the run that goes on.

        Raises:
            UsageError: there is no such data, or the resumed run began with other data.
        """
