"""The base of synthetic tasks: sequences from a key, and a data stream for the trainer."""

import dataclasses
import functools
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.harness.config import BatchConfig
from experiments.tasks.base import Batch, Metric, TaskConfig

if TYPE_CHECKING:
    from e88_jax.model import LanguageModel
    from experiments.harness.run import Run


class Sequences(NamedTuple):
    """Sequences with their answers, each array `[rows, T]`."""

    inputs: Array
    """Token ids, int32."""
    targets: Array
    """The answer at each position, int32; it means nothing where the weight is 0."""
    weights: Array
    """1 where an answer is asked, else 0, float32."""


def is_right(logits: Array, targets: Array) -> Array:
    """1 where the largest logit is the target's, else 0, float32."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


ACCURACY = Metric("accuracy", "accuracy", "higher", per_target=is_right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig(TaskConfig):
    """A task whose sequences a program draws; a class for each."""

    NAME: ClassVar[str]
    """The task's name on the command line."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens and answers have ids below it."""

    @abstractmethod
    def check_length(self, length: int) -> None:
        """Raises ValueError if sequences of `length` tokens are too short for the task."""

    def most_answers(self, length: int) -> int:
        """Answers that are asked in a row of `length` tokens, at most."""
        return length

    @abstractmethod
    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        """Random sequences, the same ones for the same arguments; may be traced by `jax.jit`.

        Args:
            key: of `jax.random.key`.
            rows: sequences.
            length: T, tokens of each.
        """

    def batch(self, key: Array, passes: int, rows: int, length: int) -> Batch:
        """Random sequences as a batch of passes; may be traced by `jax.jit`."""
        inputs, targets, weights = self.sample(key, passes * rows, length)
        n, positions = self.most_answers(length), None
        if n < length:
            _, positions = lax.top_k(weights, n)
            targets, weights = (
                jnp.take_along_axis(x, positions, axis=1) for x in (targets, weights)
            )
        batch = Batch(inputs, targets, weights, restart=True, positions=positions)
        arrays = jax.tree.map(lambda x: x.reshape(passes, rows, -1), batch._replace(restart=None))
        return arrays._replace(restart=True)

    def chance(self, length: int, rows: int = 256) -> float:
        """Accuracy of always giving the most frequent answer, at a length.

        Counted on 8,192 sequences, in batches of `rows`: the number of those that are read shares
        their program.
        """
        return _chance(self, length, rows)

    def open(self, batch: BatchConfig, resumed: Path | None) -> "Synthetic":
        del resumed
        if batch.stateful:
            raise UsageError(
                "--stateful continues sequences from step to step; those of synthetic tasks begin "
                "anew."
            )
        try:
            self.check_length(batch.seq_len)
        except ValueError as error:
            raise UsageError(f"--seq-len: {error}") from None
        return Synthetic(self, batch)


CHANCE_ROWS = 8192
"""Sequences from which a chance level is counted."""


@functools.cache
def _chance(task: SyntheticConfig, length: int, rows: int) -> float:
    # Chosen on one half and counted on the other: the largest of counts is above its expectation.
    chosen, counted = np.zeros((2, task.vocab_size))
    for batch in range(max(2, -(-CHANCE_ROWS // rows))):
        counts = chosen if batch % 2 == 0 else counted
        _, targets, weights = sampler(task, rows, length)(held_out_key(batch))
        targets, weights = np.asarray(targets).ravel(), np.asarray(weights).ravel()
        counts += np.bincount(targets, weights, task.vocab_size)
    return float(counted[chosen.argmax()] / counted.sum())


def sampler(task: SyntheticConfig, rows: int, length: int) -> Callable[[Array], Sequences]:
    """`task.sample` of `rows` sequences of `length` tokens, from a key, compiled."""
    return _compiled(type(task).sample, task, rows, length, device=_default_device())


def _batches(task: SyntheticConfig, *shape: int) -> Callable[[Array], Batch]:
    """`task.batch` of `shape`, from a key, compiled."""
    return _compiled(type(task).batch, task, *shape, device=_default_device())


def _default_device() -> Any:
    return cast(Any, jax.config).jax_default_device


@functools.cache
def _compiled(
    draw: Callable[..., Any], task: SyntheticConfig, *shape: int, device: Any
) -> Callable[[Array], Any]:
    """`draw` of a task and a shape, from a key, compiled for the default device, `device`."""
    del device
    drawn = jax.jit(lambda key: draw(task, key, *shape))
    return drawn.lower(jax.eval_shape(jax.random.key, 0)).compile()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking(SyntheticConfig):
    """A task with an answer at every position: the state that the tokens so far lead to."""

    answers: Literal["all", "last"] = "all"
    """Positions whose answer is asked: all, or the last."""
    min_length: int | None = None
    """Lengths of sequences are drawn uniformly from this to --seq-len; None for --seq-len alone."""

    def __post_init__(self) -> None:
        require(self, "min_length", minimum=1)

    def check_length(self, length: int) -> None:
        if self.min_length is not None and length < self.min_length:
            raise ValueError(f"{length} is shorter than --min-length {self.min_length}.")

    @abstractmethod
    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        """Tokens and states, each `[rows, T]` int32."""

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_walk, of_lengths = jax.random.split(key)
        inputs, states = self.walk(of_walk, rows, length)
        position = jnp.arange(length)[None]
        lengths = draw_lengths(of_lengths, rows, self.min_length, length)[:, None]
        asked = position < lengths if self.answers == "all" else position == lengths - 1
        return Sequences(inputs, states, jnp.broadcast_to(asked, inputs.shape).astype(jnp.float32))


def draw_lengths(key: Array, rows: int, low: int | None, high: int) -> Array:
    """Lengths `[rows]` int32, uniform from `low` to `high`; `high` if `low` is None."""
    low = high if low is None else low
    return jax.random.randint(key, (rows,), low, high + 1, jnp.int32)


def training_key(seed: int | Array, step: int | Array) -> Array:
    """The key of a training step's sequences."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), step)


def held_out_key(index: int | Array) -> Array:
    """The key of a batch of sequences on which no step trains, the same for every seed."""
    return jax.random.fold_in(jax.random.key(1), index)


class Synthetic:
    """The data stream of a synthetic task for the trainer: other sequences at every step."""

    metric = ACCURACY
    tokens = "tokens"

    VALIDATION_BATCHES: ClassVar[int] = 16
    READ_ROWS: ClassVar[int] = 256
    """Sequences of each length that the trained model reads."""

    def __init__(self, config: SyntheticConfig, batch: BatchConfig):
        self.config, self.vocab_size = config, config.vocab_size
        self._batch = batch

    def __getitem__(self, step: int) -> Batch:
        return self._draw(training_key(self._batch.seed, step), self._batch.shape)

    def validation(self) -> list[Batch]:
        shape = 1, self._batch.batch_size
        return [self._draw(held_out_key(i), shape) for i in range(self.VALIDATION_BATCHES)]

    def _draw(self, key: Array, shape: tuple[int, int]) -> Batch:
        drawn = _batches(self.config, *shape, self._batch.seq_len)(key)
        # On the host: a copy from one CPU device to another would wait for the sequences on a
        # thread of XLA's, which has no more of them than an all-reduce may need.
        return jax.tree.map(np.asarray, drawn)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.config, self._batch.seq_len)).encode()).hexdigest()

    def describe(self) -> str:
        chance = self.config.chance(self._batch.seq_len)
        return f"{self.config.NAME}, {self._batch.seq_len} tokens, chance {chance:.3f}"

    def write(self, directory: Path) -> None:
        """Writes nothing: the flags and the seed are the data."""

    def finish(self, model: "LanguageModel", run: "Run") -> None:
        """Reads at the training length and up to 8 times it, and writes `lengths.json`."""
        from .reading import Reader, Reading, lengths_from

        window = self._batch.seq_len
        graphdef, params = nnx.split(model)
        lane = jax.tree.map(lambda x: x[None], params)
        lengths = lengths_from(window, 8 * window)
        readings = [Reading(task=self.config, length=length) for length in lengths]
        rows = self.READ_ROWS
        read = Reader(graphdef, lane, readings, window=window, batches=1, batch_size=rows)(lane)
        found = {
            length: {"accuracy": float(value), "chance": self.config.chance(length)}
            for length, (value,) in zip(lengths, read, strict=True)
        }
        run.write("lengths.json", json.dumps(found, indent=2).encode() + b"\n")
        said = (f"{x['accuracy']:.3f} at {length}" for length, x in found.items())
        run.say(f"accuracy by length: {', '.join(said)}; in lengths.json")
