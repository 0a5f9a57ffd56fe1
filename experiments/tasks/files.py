"""The files that --data names, each once, whatever names lead to it."""

import collections
import errno
import glob
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from experiments.cli.errors import UsageError
from experiments.harness import run_directory

_NO_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that hold other packages, tests or compiled code."""
_RUNS = "directories of runs"


def absolute(pattern: str) -> str:
    """`pattern` such that it names the same files from any working directory.

    Raises:
        UsageError: it is empty.
    """
    _refuse_empty(pattern)
    if _exists(pattern):
        return os.path.join(os.getcwd(), pattern)
    return os.path.join(glob.escape(os.getcwd()), os.path.expanduser(pattern))


def find_files(
    patterns: Sequence[str], left_out: collections.Counter[str] | None = None
) -> list[Path]:
    """The files that `patterns` name, in order, empty ones included.

    Links are followed. A file that several names lead to is taken by the first of them. In folders
    and below `**`, hidden names and the directories of runs are left out.

    Args:
        patterns: paths of files or folders, or globs (`**` for any depth). A name that exists is no
            glob. None at all is the Python standard library.
        left_out: is given the counts of what is left out, by kind.

    Raises:
        UsageError: a pattern names nothing, or something cannot be read.
    """
    left_out = collections.Counter() if left_out is None else left_out
    found: dict[tuple[int, int] | str, Path] = {}
    names: set[Path] = set()
    try:
        if not patterns:
            return standard_library_files()
        for pattern in patterns:
            runs = left_out[_RUNS]
            paths = [*_files_of(pattern, left_out)]
            if not paths and left_out[_RUNS] == runs:
                is_folder = os.path.isdir(os.path.expanduser(pattern))
                what = "holds no file" if is_folder else "is no file, directory or matching glob"
                raise UsageError(f"--data {pattern} {what}.")
            for path in paths:
                names.add(Path(path))
                found.setdefault(_identity(path), Path(path))
    except OSError as error:
        raise UsageError(f"--data {error.filename} cannot be read: {error.strerror}.") from None
    if not found:
        raise UsageError(
            f"--data {' '.join(patterns)} holds nothing but what runs wrote: name the files that "
            "are meant."
        )
    left_out["second names of files"] += len(names) - len(found)
    return [*found.values()]


def standard_library_files() -> list[Path]:
    """The source files of the running Python's standard library, without its tests."""
    root = sysconfig.get_path("stdlib")
    found = _walk(root, _NO_SOURCE.__contains__, collections.Counter())
    return [Path(path) for path, is_folder in found if path.endswith(".py") and not is_folder]


def _refuse_empty(pattern: str) -> None:
    if not pattern:
        raise UsageError('--data "" names nothing: is a shell variable unset?')


def _files_of(pattern: str, left_out: collections.Counter[str]) -> Iterator[str]:
    """The regular files that a pattern stands for: of that name, in the folder, or matching."""
    _refuse_empty(pattern)
    at_home = os.path.expanduser(pattern)
    named = [name for name in (pattern, at_home) if _exists(name)][:1]
    for name in named or sorted(_glob(at_home, left_out)):
        if os.path.isdir(name):
            inside = _walk(name, _is_hidden, left_out)
            yield from _regular((path for path, is_folder in inside if not is_folder), left_out)
        elif not named:
            yield from _regular([name], left_out)
        elif stat.S_ISREG(os.stat(name).st_mode):
            yield name
        else:
            raise UsageError(f"--data {name} is not a regular file.")


def _regular(paths: Iterable[str], left_out: collections.Counter[str]) -> Iterator[str]:
    for path in paths:
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                yield path
            else:
                left_out["special files"] += 1
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            left_out["links to nothing"] += 1


def _glob(pattern: str, left_out: collections.Counter[str]) -> Iterator[str]:
    """`glob.glob`, but `**` enters each folder once: loops of links end."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    below = parts[at + 1 :]
    for top in glob.glob(os.sep.join([*parts[:at], ""])) if at else [os.curdir]:
        if not below:
            yield top
            continue
        for path, is_folder in _walk(top, _is_hidden, left_out):
            if is_folder:
                yield from _glob(os.path.join(glob.escape(path), *below), left_out)


def _walk(
    top: str, skips: Callable[[str], bool], left_out: collections.Counter[str]
) -> Iterator[tuple[str, bool]]:
    """`(path, is it a folder)` of `top` and all below it, by name; each folder once.

    Folders and files whose name `skips`, and the directories of runs, are left out.
    """
    entered = set()
    stack = [(top, True)]
    while stack:
        path, is_folder = stack.pop()
        if is_folder:
            identity = _identity(path)
            if identity in entered:
                continue
            entered.add(identity)
            if run_directory.is_run(Path(path)):
                left_out[_RUNS] += 1
                continue
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
            for entry in inside:
                if skips(entry.name):
                    left_out["hidden names"] += 1
                else:
                    # entry.is_dir raises for a link to itself.
                    by_path = entry.is_symlink() and os.path.isdir(entry.path)
                    stack.append((entry.path, by_path or entry.is_dir(follow_symlinks=False)))
        yield path, is_folder


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _identity(path: str) -> tuple[int, int] | str:
    """Equal for two names of the same file."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _exists(name: str) -> bool:
    """Unlike `os.path.lexists`, raises what keeps it from knowing."""
    try:
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
