"""Trains a model on a synthetic task: what can it track? `--help` explains every flag."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from experiments import cli
from experiments.cli.names import TASK, flag_of, value_of
from experiments.harness import program
from experiments.harness.config import BatchConfig, OptimizerConfig, TrainConfig
from experiments.tasks.synthetic import TASKS, Parity, SyntheticConfig

DEFAULT_TASK = Parity()
DEFAULT_BATCH = BatchConfig(seq_len=64, batch_size=32)
DEFAULT_OPTIMIZER = OptimizerConfig(learning_rate=2e-3, weight_decay=0.01)
DEFAULT_MODEL = LMConfig(
    dim=128,
    depth=2,
    layers=(E88Config(n_heads=4, n_state=32),),
    vocab_size=DEFAULT_TASK.vocab_size,
    execution=Execution(saved_state_interval=8),
)
"""Model that learns parity within a minute on two CPU cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticTrainConfig(TrainConfig):
    """Train a model on a synthetic task: sequences of a program in, accuracy by length out."""

    task_name: Annotated[
        Literal[tuple(TASKS)],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(name=TASK),
    ] = Parity.NAME
    """Task to learn; its own flags, below, depend on it."""
    task: SyntheticConfig = DEFAULT_TASK
    steps: int = 400
    batch: BatchConfig = DEFAULT_BATCH
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    model: LMConfig = DEFAULT_MODEL

    NAME: ClassVar[str] = "synthetic"

    @classmethod
    def defaults(cls, args: Sequence[str]) -> Self | None:
        name = value_of("--" + TASK, args)
        if name not in TASKS:
            return None
        return cls(task_name=name, task=TASKS[name]()).with_defaults(DEFAULT_MODEL)

    @classmethod
    def hint_at(cls, flag: str) -> str | None:
        """Advice for a flag of other tasks; None for any other flag."""
        tasks = [
            name
            for name, kind in TASKS.items()
            if flag in {flag_of(field.name) for field in dataclasses.fields(kind)}
        ]
        return f"it needs --{TASK} {' or '.join(tasks)}." if tasks else None

    def with_defaults(self, model: LMConfig) -> Self:
        vocab_size = self.task.vocab_size
        return super().with_defaults(dataclasses.replace(model, vocab_size=vocab_size))

    @classmethod
    def types_of(cls, values: dict[str, Any]) -> dict[str, Any]:
        kind = TASKS.get(values.get("task_name", ""), SyntheticConfig)
        return super().types_of(values) | {"task": kind}


def main(args: Sequence[str]) -> None:
    """Parses, checks the directory, trains, reads at several lengths."""
    program.main(SyntheticTrainConfig, args)


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
