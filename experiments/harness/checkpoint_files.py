"""The files of a checkpoint: their checksums, and whether they are damaged."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.cli.errors import UsageError

CHECKSUMS = "checksums.json"
"""File of a checkpoint that holds the SHA-256 of the others."""


def damage_of(checkpoint: Path, only: str | None = None) -> str | None:
    """The first file of a checkpoint (or the file named) that is damaged; None if none is."""
    path = checkpoint / CHECKSUMS
    if (content := _read(path)) is None:
        return None
    try:
        sums = {name: str(sum_) for name, sum_ in json.loads(content)["sha256"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{CHECKSUMS} is not as it was written"
    if only is not None:
        sums = {name: sum_ for name, sum_ in sums.items() if name == only}
    for path, found in sha256_of([checkpoint / name for name in sums]):
        name = str(path.relative_to(checkpoint))
        if found is None:
            return f"{name} is missing"
        if found != sums[name]:
            return f"{name} is not as it was written"
    return None


def value_of(checkpoint: Path, metric: str) -> tuple[str | None, float | None]:
    """The damage to a checkpoint's metrics, or else the value of the metric if it has any."""
    name = "metrics/metrics"
    if (content := _read(checkpoint / name)) is None:  # or its owner was killed as it deleted it
        return None, None
    if why := damage_of(checkpoint, only=name):
        return why, None
    try:
        return None, float(json.loads(content)[metric])
    except (KeyError, TypeError, ValueError):
        return f"{name} is not as it was written", None


def sha256_of(files: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Each file with its checksum, None for a missing one; four are read at a time."""

    def sha256(path: Path) -> str | None:
        with _reading(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        yield from zip(files, pool.map(sha256, files), strict=True)


def _read(path: Path) -> bytes | None:
    """The bytes of a file, or None if there is no such file."""
    with _reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Ignores a missing file; any other failure to read is a UsageError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    except (OSError, MemoryError) as error:
        raise UsageError(
            f"{path} cannot be read ({reason(error)}), which does not say that it is damaged; "
            f"nothing was moved."
        ) from error


def reason(error: Exception) -> str:
    """The operating system's message in the error, else the error's first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if code is not None:
        return os.strerror(int(code[1]))
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).partition("\n")[0] or type(error).__name__
