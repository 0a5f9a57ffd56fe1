"""Byte language modelling: windows of a corpus, each byte predicted from those before it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from experiments.cli import require
from experiments.cli.errors import UsageError, warn
from experiments.harness import run_directory
from experiments.harness.config import BatchConfig, TrainConfig

from . import files
from .base import Batch, Metric, TaskConfig
from .corpus import LISTING, Corpus, reopen, split, warn_of_copies

if TYPE_CHECKING:
    from e88_jax.model import LanguageModel
    from experiments.harness.run import Run

BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", "lower", scale=1.4426950408889634)
"""Cross-entropy over ln 2, as a byte is one token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesConfig(TaskConfig):
    """Corpus, evaluation and sample."""

    data: tuple[str, ...] = ()
    """Files, directories or globs of bytes; none for the Python standard library's source. With
    --resume, where the files of the run are now, if they were moved."""
    val_fraction: float = 0.05
    """Fraction of the bytes, at the end, that is kept for validation."""
    eval_bytes: int = 65536
    """Validation bytes that an evaluation reads, the same ones each time."""
    sample_bytes: int = 400
    """Bytes of the sample written at the end."""
    prompt: str = "def "
    """Text that the sample continues."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"data", "sample_bytes", "prompt"})
    FILES: ClassVar[tuple[str, ...]] = (LISTING,)

    def __post_init__(self) -> None:
        require(self, "val_fraction", above=0, below=1)
        require(self, "eval_bytes", minimum=1)
        require(self, "sample_bytes", minimum=0)
        if self.sample_bytes and not self.prompt:
            raise ValueError("--prompt must have at least one byte when --sample-bytes is not 0.")

    def located(self, args: Sequence[str]) -> Self:
        if not self.data and "--data" in args:
            raise UsageError("--data names nothing: is a shell variable unset?")
        return dataclasses.replace(self, data=tuple(map(files.absolute, self.data)))

    def open(self, batch: BatchConfig, resumed: Path | None) -> "Bytes":
        if resumed is None:
            return Bytes(self, batch, Corpus.of(self.data))
        stored = run_directory.load_config(resumed, ByteLMConfig).task.data
        return Bytes(self, batch, reopen(resumed / LISTING, stored, self.data))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteLMConfig(TrainConfig):
    """Train an E88 language model on bytes: a corpus in, a checkpoint and a loss curve out."""

    task: BytesConfig = BytesConfig()

    NAME: ClassVar[str] = "byte-lm"


class Bytes:
    """The task. Inputs and targets are views of one window of bytes, shifted by one.

    Raises:
        UsageError: the corpus is too short.
    """

    vocab_size = 256
    metric = BITS_PER_BYTE
    tokens = "bytes"

    def __init__(self, config: BytesConfig, batch: BatchConfig, corpus: Corpus):
        self._config, self._batch, self._corpus = config, batch, corpus
        self._training, self._validation = split(corpus, config.val_fraction, batch.seq_len)
        self._windows = training_windows(
            self._training, batch.shape, batch.seq_len, stateful=batch.stateful, seed=batch.seed
        )
        warn_of_copies(self._training, self._validation)

    def __getitem__(self, step: int) -> Batch:
        return self._windows[step]

    def read_rows(self, step: int, rows: slice) -> Batch:
        return self._windows.read_rows(step, rows)

    def validation(self) -> list[Batch]:
        rows, seq_len = self._batch.batch_size, self._batch.seq_len
        return validation_batches(self._validation, rows, seq_len, self._config.eval_bytes)

    def fingerprint(self) -> str:
        return self._corpus.fingerprint()

    def describe(self) -> str:
        left_out = self._corpus.left_out
        return (
            f"{len(self._training):,} bytes for training and {len(self._validation):,} for "
            f"validation in {len(self._corpus.files):,} files"
            + (f" (left out: {left_out})" if left_out else "")
        )

    def write(self, directory: Path) -> None:
        self._corpus.write_listing(directory / LISTING)

    def finish(self, model: "LanguageModel", run: "Run") -> None:
        """Writes `sample.txt`; weights that are not finite give a warning instead."""
        if not self._config.sample_bytes:
            return
        import jax

        from e88_jax.sampling import generate

        prompt = np.frombuffer(os.fsencode(self._config.prompt), np.uint8)
        key = jax.random.key(self._batch.seed)
        try:
            drawn = generate(model, prompt[None], self._config.sample_bytes, key=key)
        except ValueError as error:
            warn(f"no sample: {error}")
            return
        sample = bytes([*prompt.tolist(), *drawn[0].tolist()])
        run.write("sample.txt", sample)
        run.say(f"a sample:\n{sample.decode('utf-8', errors='replace')}\n")


def _read(corpus: Corpus, starts: np.ndarray, seq_len: int, *, restart: bool) -> Batch:
    """Windows of `seq_len` bytes at these starts, and the byte after each of their bytes."""
    pieces = [corpus.read(start, seq_len + 1) for start in starts.ravel().tolist()]
    windows = np.stack(pieces).reshape(*starts.shape, seq_len + 1)
    return Batch(windows[..., :-1], windows[..., 1:], None, restart)


@dataclasses.dataclass(frozen=True)
class RandomWindows:
    """Windows at random starts, drawn from (seed, step)."""

    corpus: Corpus
    shape: tuple[int, int]
    """Passes and rows."""
    seq_len: int
    seed: int

    def __getitem__(self, step: int) -> Batch:
        return self.read_rows(step, slice(None))

    def read_rows(self, step: int, rows: slice) -> Batch:
        """Part of a step's batch: its rows in this slice."""
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(len(self.corpus) - self.seq_len, size=self.shape)
        return _read(self.corpus, starts[:, rows], self.seq_len, restart=True)


@dataclasses.dataclass(frozen=True)
class ConsecutiveWindows:
    """Consecutive windows: each row reads its own stretch of the corpus in a loop."""

    corpus: Corpus
    shape: tuple[int, int]
    """Passes and rows."""
    seq_len: int

    @property
    def per_row(self) -> int:
        """Windows in a row's stretch."""
        passes, rows = self.shape
        return (len(self.corpus) // (passes * rows) - 1) // self.seq_len

    def __getitem__(self, step: int) -> Batch:
        return self.read_rows(step, slice(None))

    def read_rows(self, step: int, rows: slice) -> Batch:
        """Part of a step's batch: its rows in this slice."""
        n = self.shape[0] * self.shape[1]
        window, stretch = step % self.per_row, len(self.corpus) // n
        starts = stretch * np.arange(n).reshape(self.shape)[:, rows] + window * self.seq_len
        return _read(self.corpus, starts, self.seq_len, restart=window == 0)


def training_windows(
    corpus: Corpus, shape: tuple[int, int], seq_len: int, *, stateful: bool, seed: int
) -> RandomWindows | ConsecutiveWindows:
    """The batches by step.

    Raises:
        UsageError: the corpus has no window for each row of a stateful run.
    """
    if not stateful:
        return RandomWindows(corpus, shape, seq_len, seed)
    windows = ConsecutiveWindows(corpus, shape, seq_len)
    if windows.per_row < 1:
        raise UsageError(
            f"{len(corpus):,} training bytes over {shape[0] * shape[1]} rows are shorter than one "
            f"window of {seq_len + 1:,} each: give more --data, or a smaller --batch-size or "
            f"--seq-len."
        )
    return windows


def validation_batches(corpus: Corpus, rows: int, seq_len: int, n_bytes: int) -> list[Batch]:
    """Consecutive windows from the start, about `n_bytes` in all, at most `rows` abreast."""
    rows = min(rows, len(corpus) // (seq_len + 1))
    per_row = max(1, round(n_bytes / (rows * seq_len)))
    corpus = corpus.part(0, min(len(corpus), rows * (per_row * seq_len + 1)))
    windows = ConsecutiveWindows(corpus, (1, rows), seq_len)
    return [windows[index] for index in range(windows.per_row)]
