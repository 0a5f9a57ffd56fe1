"""Ownership of a run's directory: a lock file names the one process that writes there."""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from experiments.cli.errors import UsageError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = "lock"
"""Name of the lock file, there while a process owns the directory, or if it was killed."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, distinct from any other with the same pid."""

    host: str
    boot: str
    """Boot id of the host's kernel: the same in all containers, another after a restart."""
    pid: int
    started: int | None
    """Clock ticks from boot to the start of the process, if /proc has them."""
    since: str
    """Time at which it took the directory, for messages."""

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            boot = host
        return cls(host, boot, pid, _started(pid), time.strftime("%Y-%m-%d %H:%M:%S %z"))

    def has_ended(self, *, locks_work: bool) -> bool | None:
        """Whether the owner's process has ended; None if that cannot be known.

        `locks_work`: this process has locked the owner's lock file, so under the same kernel the
        owner has ended.
        """
        here = Owner.here()
        if self.boot == here.boot:
            return locks_work or _started(self.pid) != self.started
        return True if self.host == here.host else None  # restarted since


def _started(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[Path]:
    """A context in which this process owns `directory`: the file `lock` in it says so.

    The kernel drops the lock when the process ends. A shared file system may not show the locks of
    another machine, so the file also names its owner; an owner on another host counts until someone
    deletes the file.

    Raises:
        UsageError: another process owns the directory, or the file cannot be written.
    """
    path = directory / LOCK
    file = _take(path)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            if _is(file, path):
                path.unlink()
        file.close()


def _take(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            try:
                locks_work = _lock(file)
            except BlockingIOError:
                raise UsageError(
                    f"{path.parent} is in use by {_described(_read(file))}: wait until it ends, "
                    f"stop it, or choose another --out."
                ) from None
            if not _is(file, path):  # the owner left, and took the file along
                file.close()
                continue
            owner = _read(file)
            ended = owner is None or owner.has_ended(locks_work=locks_work)
            if not ended:
                cannot = " From here nobody can see whether it runs." if ended is None else ""
                raise UsageError(
                    f"{path.parent} is in use by {_described(owner)}.{cannot} If it runs no more, "
                    f"delete {path}."
                )
            _write(file, path)
            return file
        except BaseException:
            file.close()
            raise


def _lock(file: IO[str]) -> bool:
    """Locks the file; returns whether the file system has locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: IO[str]) -> Owner | None:
    """The owner that the file names, or None if it names none."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], path: Path) -> None:
    try:
        file.truncate(0)
        file.write(json.dumps(dataclasses.asdict(Owner.here())) + "\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None


def _described(owner: Owner | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.pid} on host {owner.host} since {owner.since}"
