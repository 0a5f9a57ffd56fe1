"""Bytes for training and validation: files as one memory-mapped sequence, cut into windows."""

import bisect
import dataclasses
import functools
import glob
import hashlib
import itertools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from .errors import UsageError


def standard_library_files() -> list[Path]:
    """The source files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not left_out.intersection(path.parts)]


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that `patterns` name, in order; hidden files inside directories are left out.

    Args:
        patterns: paths of files or directories, or globs (`**` for any depth). None at all is the
            Python standard library.

    Raises:
        UsageError: a pattern names nothing.
    """
    if not patterns:
        return standard_library_files()
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        names = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = list(itertools.chain.from_iterable(map(_files_in, names)))
        if not found:
            what = "holds no file" if path.is_dir() else "is no file, directory or matching glob"
            raise UsageError(f"--data {pattern} {what}.")
        files += found
    return list(dict.fromkeys(files))


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"--data {path} is not a regular file.")
        return [path]
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


@functools.lru_cache(maxsize=64)  # each holds a file descriptor
def _map_file(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="r")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Part of the bytes of some files, end to end. Nothing is read before it is asked for."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]
    """Position just past each file."""
    start: int
    stop: int

    @classmethod
    def of(cls, patterns: Sequence[str]) -> "Corpus":
        """All bytes of the files that `patterns` name (see `find_files`).

        Raises:
            UsageError: no such file, an unreadable one, or no bytes at all.
        """
        files = find_files(patterns)
        try:
            sizes = {file: file.stat().st_size for file in files}
            for file in files:
                with file.open("rb"):  # may be forbidden
                    pass
        except OSError as error:
            raise UsageError(f"--data {error.filename} cannot be read: {error.strerror}.") from None
        full = tuple(file for file in files if sizes[file])  # an empty file cannot be mapped
        if not full:
            raise UsageError(f"--data {' '.join(patterns)} holds no bytes: every file is empty.")
        ends = tuple(itertools.accumulate(sizes[file] for file in full))
        return cls(full, ends, 0, ends[-1])

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Corpus":
        """The bytes from `start` up to `stop`."""
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` bytes from `start` on, uint8."""
        position, stop = self.start + start, self.start + start + length
        pieces = []
        index = bisect.bisect_right(self.ends, position)
        while position < stop:
            file_start = self.ends[index - 1] if index else 0
            until = min(stop, self.ends[index])
            data = _map_file(self.files[index])
            pieces.append(data[position - file_start : until - file_start])
            position, index = until, index + 1
        return np.concatenate(pieces)

    def fingerprint(self) -> str:
        """Changes when a file of the corpus is added, removed, renamed or resized."""
        names = "\n".join(
            f"{file.name}:{end}" for file, end in zip(self.files, self.ends, strict=True)
        )
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def split(corpus: Corpus, val_fraction: float, seq_len: int) -> tuple[Corpus, Corpus]:
    """The training bytes and, after them, the validation bytes.

    Raises:
        UsageError: either is shorter than one window and the byte after it.
    """
    n_train = len(corpus) - round(len(corpus) * val_fraction)
    parts = corpus.part(0, n_train), corpus.part(n_train, len(corpus))
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) < seq_len + 1:
            raise UsageError(
                f"the corpus of {len(corpus):,} bytes leaves {len(part):,} for {name}, shorter "
                f"than one window of {seq_len + 1:,}: give more --data, a smaller --seq-len or "
                f"another --val-fraction."
            )
    return parts


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows of bytes, and the byte that follows each."""

    windows: np.ndarray
    """`[passes, rows, seq_len + 1]` uint8; each byte but the first is a target."""
    restart: bool
    """These windows do not continue those of the batch before."""


def _read(corpus: Corpus, starts: np.ndarray, length: int) -> np.ndarray:
    """`length` bytes from each position on, `[*starts.shape, length]`."""
    pieces = [corpus.read(start, length) for start in starts.ravel().tolist()]
    return np.stack(pieces).reshape(*starts.shape, length)


@dataclasses.dataclass(frozen=True)
class RandomWindows:
    """Windows that start anywhere, drawn afresh for each step from (seed, step)."""

    corpus: Corpus
    shape: tuple[int, int]
    """Passes and rows."""
    seq_len: int
    seed: int

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(len(self.corpus) - self.seq_len, size=self.shape)
        return Batch(_read(self.corpus, starts, self.seq_len + 1), restart=True)


@dataclasses.dataclass(frozen=True)
class ConsecutiveWindows:
    """Each row reads a stretch of the corpus of its own from its start to its end, then again."""

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
        passes, rows = self.shape
        window = step % self.per_row
        stretch = len(self.corpus) // (passes * rows)
        starts = stretch * np.arange(passes * rows).reshape(self.shape) + window * self.seq_len
        return Batch(_read(self.corpus, starts, self.seq_len + 1), restart=window == 0)


Windows = RandomWindows | ConsecutiveWindows
"""The batch of every step, by number: where training stands is one integer."""


def training_windows(
    corpus: Corpus, shape: tuple[int, int], seq_len: int, *, stateful: bool, seed: int
) -> Windows:
    """What training reads.

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
    """The same consecutive windows each time, about `n_bytes` in all, at most `rows` abreast."""
    rows = min(rows, len(corpus) // (seq_len + 1))
    per_row = max(1, round(n_bytes / (rows * seq_len)))
    corpus = corpus.part(0, min(len(corpus), rows * (per_row * seq_len + 1)))
    windows = ConsecutiveWindows(corpus, (1, rows), seq_len)
    return [windows[index] for index in range(windows.per_row)]


def prefetch(windows: Windows) -> grain.DatasetIterator[Batch]:
    """Reads batches ahead of the training loop; `get_state` and `set_state` give its position."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(1 << 62)  # without end
    return iter(steps.map(windows.__getitem__).to_iter_dataset(ahead))
