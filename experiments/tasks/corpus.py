"""A corpus: the bytes of some files as one sequence, held to what they were."""

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

import numpy as np

from experiments.cli.errors import UsageError, warn
from experiments.harness import run_directory

from .base import DataError
from .files import find_files

LISTING = "corpus.jsonl"
"""File of a run that lists the files of its corpus."""
DIGEST_BLOCK, DIGEST_BLOCKS = 16 * 1024, 64
"""Bytes per block and blocks per file that a digest reads, spread from start to end; a smaller file
is read whole."""


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
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


_open = functools.lru_cache(maxsize=64)(_OpenFile)  # bounds the descriptors


@dataclasses.dataclass
class DataFile:
    """The first `size` bytes of a file, held to what they were."""

    path: Path
    size: int
    digest: str
    _status: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    """Status of the file when its bytes last matched the digest."""

    @classmethod
    def at(cls, path: Path) -> "DataFile":
        """The bytes that a file holds now.

        Raises:
            DataError: it cannot be read.
        """
        with _in_a_sentence(path):
            file = _OpenFile(path)
            status = file.status()
            return cls(path, status[0], file.digest(status[0]), status)

    def check(self) -> int:
        """The file's bytes now, of which the first `size` are what they were.

        Raises:
            DataError: they are not, or the file cannot be read.
        """
        with _in_a_sentence(self.path):
            return self._opened().status()[0]

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on.

        Raises:
            DataError: the file cannot be read, or holds other bytes than it did.
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
            raise DataError(f"{self.path} was cut short, from {self.size:,} bytes to {size:,}.")
        if file.digest(self.size) != self.digest:
            raise DataError(f"{self.path} has changed: its {self.size:,} bytes are others now.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Part of the bytes of some files, end to end."""

    sources: tuple[DataFile, ...]
    start: int
    stop: int
    left_out: str = ""
    """Counts of the files left out, such as "hidden names 2, empty files 1"."""

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
        """The corpus that `write_listing` listed; its files are not looked at.

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
            DataError: a file cannot be read, or holds other bytes than it did.
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
        """The files that are in this part whole."""
        return [
            source
            for source, end in zip(self.sources, self._ends, strict=True)
            if self.start <= end - source.size and end <= self.stop
        ]

    def fingerprint(self) -> str:
        """Digest of sizes, bytes and order of the files."""
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


def reopen(listing: Path, stored: Sequence[str], given: Sequence[str]) -> Corpus:
    """The corpus of a run that is resumed, wherever its files are now.

    Args:
        listing: `corpus.jsonl` of the run.
        stored: --data that the run began with.
        given: --data now; another one names the same bytes elsewhere.

    Raises:
        UsageError: the files hold other bytes or cannot be read.
    """
    before = Corpus.listed(listing)
    if given != stored:
        corpus = Corpus.of(given)
        if corpus.fingerprint() != before.fingerprint():
            raise UsageError(
                f"the run in {listing.parent} has another configuration, --data {' '.join(stored)} "
                f"(not {' '.join(given)}, which holds other bytes): leave --data out to resume it, "
                "or choose another --out."
            )
        return corpus
    for source in before.sources:
        try:
            grown = source.check() - source.size
        except DataError as error:
            raise UsageError(
                f"the corpus is not the one that the run in {listing.parent} began with: {error} "
                "If it is elsewhere now, name it with --data."
            ) from None
        if grown:
            warn(
                f"{source.path} has grown by {grown:,} bytes since the run began: it goes on with "
                f"the first {source.size:,}."
            )
    return before


def warn_of_copies(training: Corpus, validation: Corpus) -> None:
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
