"""One trial: a task, a model, a training."""

import dataclasses

from e88_jax.config import LMConfig
from experiments.harness.config import OptimizerConfig
from experiments.tasks.synthetic import SyntheticConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A training on a task, without its seed and rate."""

    task: SyntheticConfig
    model: LMConfig
    optimizer: OptimizerConfig
    length: int
    """Tokens of a training sequence."""
    batch_size: int
    """Sequences of a step."""
    steps: int
    stop_at: float | None = None
    """Stop when the training accuracy of every lane has reached it; None for all steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """Seed and rate, in which trainings that run together differ."""

    seed: int
    """Seed of the initial weights and of the sequences."""
    learning_rate: float
