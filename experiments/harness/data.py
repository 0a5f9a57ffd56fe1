"""Bytes for training and validation: files as one sequence, cut into windows."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import run_directory
from .config import TrainConfig
from .errors import UsageError, warn
from .files import find_files

if TYPE_CHECKING:
    import grain

DIGEST_BLOCK, DIGEST_BLOCKS = 16 * 1024, 64
"""Bytes, and blocks from start to end, that the digest of a file reads; a smaller file is read
whole."""


class CorpusError(UsageError):
    """A file of the corpus no longer gives the bytes that it had."""


class _OpenFile:
    """A file descriptor, closed when nobody uses it any more."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def status(self) -> tuple[int, ...]:
        """Size, and numbers that change with the bytes as far as the system knows."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer at the end of the file."""
        data = os.pread(self._descriptor, length, start)
        while len(data) < length:  # the system may give fewer at a time
            more = os.pread(self._descriptor, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def digest(self, size: int) -> str:
        """Digest of the first `size` bytes: of all up to 1 MiB, else of blocks among them."""
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        if size <= DIGEST_BLOCK * DIGEST_BLOCKS:
            digest.update(self.read(0, size))
        else:
            for block in range(DIGEST_BLOCKS):
                start = (size - DIGEST_BLOCK) * block // (DIGEST_BLOCKS - 1)
                digest.update(self.read(start, DIGEST_BLOCK))
        return digest.hexdigest()


@contextlib.contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None


_open = functools.lru_cache(maxsize=64)(_OpenFile)  # bounds the descriptors


@dataclasses.dataclass
class DataFile:
    """The first `size` bytes of a file, held to what they were."""

    path: Path
    size: int
    digest: str
    _status: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    """That of the file when its bytes were last seen to be those of the digest."""

    @classmethod
    def at(cls, path: Path) -> "DataFile":
        """All that a file holds now.

        Raises:
            CorpusError: it cannot be read.
        """
        with _in_a_sentence(path):
            file = _OpenFile(path)
            status = file.status()
            return cls(path, status[0], file.digest(status[0]), status)

    def check(self) -> int:
        """Bytes that the file has now, of which the first are what they were.

        Raises:
            CorpusError: they are not, or the file cannot be read.
        """
        with _in_a_sentence(self.path):
            return self._opened().status()[0]

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on.

        Raises:
            CorpusError: the file cannot be read, or holds other bytes than it did.
        """
        with _in_a_sentence(self.path):
            file = self._opened()
            data = file.read(start, length)
            if len(data) < length:
                self._hold(file, start + len(data))
            return data

    def _opened(self) -> _OpenFile:
        file = _open(self.path)
        if (status := file.status()) != self._status:
            self._hold(file, status[0])
            self._status = status
        return file

    def _hold(self, file: _OpenFile, size: int) -> None:
        if size < self.size:
            raise CorpusError(f"{self.path} was cut short, from {self.size:,} bytes to {size:,}.")
        if file.digest(self.size) != self.digest:
            raise CorpusError(f"{self.path} has changed: its {self.size:,} bytes are others now.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Part of the bytes of some files, end to end."""

    sources: tuple[DataFile, ...]
    start: int
    stop: int
    left_out: str = ""
    """Files that were found and left out, such as "hidden names 2, empty files 1"."""

    @classmethod
    def of(cls, patterns: Sequence[str]) -> "Corpus":
        """All bytes of the files that `patterns` name (see `find_files`).

        Raises:
            UsageError: no such file, an unreadable one, or no bytes at all.
        """
        left_out: collections.Counter[str] = collections.Counter()
        found = [DataFile.at(path) for path in find_files(patterns, left_out)]
        sources = [source for source in found if source.size]
        if not sources:
            raise UsageError(f"--data {' '.join(patterns)} holds no bytes: every file is empty.")
        left_out["empty files"] = len(found) - len(sources)
        return cls._all(sources, ", ".join(f"{what} {n}" for what, n in left_out.items() if n))

    @classmethod
    def listed(cls, listing: Path) -> "Corpus":
        """The corpus of which `write_listing` wrote; nothing is known of its files as they are now.

        Raises:
            UsageError: there is no such listing, or it is damaged.
        """
        try:
            lines = map(json.loads, listing.read_text().splitlines())
            return cls._all(
                [DataFile(Path(line["path"]), line["bytes"], line["digest"]) for line in lines]
            )
        except FileNotFoundError:
            raise UsageError(f"{listing}, which names the files of the corpus, is gone.") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{listing} is damaged: no file of the corpus is known.") from None

    @classmethod
    def _all(cls, sources: Sequence[DataFile], left_out: str = "") -> "Corpus":
        return cls(tuple(sources), 0, sum(source.size for source in sources), left_out)

    @property
    def files(self) -> tuple[Path, ...]:
        """The path of each file."""
        return tuple(source.path for source in self.sources)

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        """Position just past each file."""
        return tuple(itertools.accumulate(source.size for source in self.sources))

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Corpus":
        """The bytes from `start` up to `stop`."""
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` bytes from `start` on, uint8.

        Raises:
            CorpusError: a file cannot be read, or holds other bytes than it did.
        """
        position, stop = self.start + start, self.start + start + length
        pieces = []
        index = bisect.bisect_right(self._ends, position)
        while position < stop:
            file_start = self._ends[index - 1] if index else 0
            until = min(stop, self._ends[index])
            pieces.append(self.sources[index].read(position - file_start, until - position))
            position, index = until, index + 1
        return np.frombuffer(b"".join(pieces), np.uint8)

    def sources_inside(self) -> list[DataFile]:
        """The files of which it holds all bytes."""
        return [
            source
            for source, end in zip(self.sources, self._ends, strict=True)
            if self.start <= end - source.size and end <= self.stop
        ]

    def fingerprint(self) -> str:
        """Changes when a file of the corpus gets other bytes or another place in the order."""
        contents = json.dumps([(source.size, source.digest) for source in self.sources])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def write_listing(self, listing: Path) -> None:
        """Writes path, size and digest of each file, a line of JSON each."""
        lines = [
            {"path": str(source.path.absolute()), "bytes": source.size, "digest": source.digest}
            for source in self.sources
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        run_directory.write(listing, content.encode())


def open_corpus(config: TrainConfig) -> Corpus:
    """The corpus of a run, seen to be long enough; of a resumed run, seen to be the same.

    Raises:
        UsageError: it is not, or cannot be read.
    """
    flags = config.data
    corpus = _same_corpus(config) if config.resume else Corpus.of(flags.data)
    training, validation = split(corpus, flags.val_fraction, flags.seq_len)
    shape = (flags.accumulate, flags.batch_size)
    training_windows(training, shape, flags.seq_len, stateful=flags.stateful, seed=flags.seed)
    _warn_of_copies(training, validation)
    return corpus


def _same_corpus(config: TrainConfig) -> Corpus:
    """The corpus of the run to be resumed, wherever its files are now."""
    directory = config.out
    assert directory is not None, "the command line names the run to resume"
    before = Corpus.listed(directory / run_directory.LISTING)
    stored = run_directory.load_config(directory).data.data
    if config.data.data != stored:
        given = Corpus.of(config.data.data)
        if given.fingerprint() != before.fingerprint():
            raise UsageError(
                f"the run in {directory} has another configuration, --data {' '.join(stored)} (not "
                f"{' '.join(config.data.data)}, which holds other bytes): leave --data out to "
                "resume it, or choose another --out."
            )
        return given
    for source in before.sources:
        try:
            grown = source.check() - source.size
        except CorpusError as error:
            raise UsageError(
                f"the corpus is not the one that the run in {directory} began with: {error} If "
                "it is elsewhere now, name it with --data."
            ) from None
        if grown:
            warn(
                f"{source.path} has grown by {grown:,} bytes since the run began: it goes on with "
                f"the first {source.size:,}."
            )
    return before


def _warn_of_copies(training: Corpus, validation: Corpus) -> None:
    """Says so if files of the validation bytes, 1 % of these or more, are trained on as well."""
    trained = {source.digest for source in training.sources_inside()}
    copies = [x for x in validation.sources_inside() if x.digest in trained]
    if (share := sum(x.size for x in copies) / len(validation)) >= 0.01:
        warn(
            f"{share:.0%} of the validation bytes are trained on: {copies[0].path}"
            + (f" and {len(copies) - 1} more files are" if copies[1:] else " is")
            + " among the training files under another name."
        )


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


def prefetch(windows: Windows) -> "grain.DatasetIterator[Batch]":
    """Reads batches ahead of the training loop; `get_state` and `set_state` give its position."""
    import grain  # imports JAX

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(1 << 62)  # without end
    return iter(steps.map(windows.__getitem__).to_iter_dataset(ahead))
