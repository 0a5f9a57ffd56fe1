"""Command lines from dataclasses: help by tyro, mistakes in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from .errors import RunStopped, UsageError

Config = TypeVar("Config")


def parse(config: type[Config], args: Sequence[str], default: Config | None = None) -> Config:
    """A `config` from command-line `args`; what they do not name is as in `default`.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
        SystemExit: after printing the help that `--help` asks for.
    """
    _refuse_empty_paths(config, args)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                config,
                args=args,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UsageError(_first_sentence(printed.getvalue())) from None
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], list(_flags(config)), 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags."
        raise UsageError(f"unknown argument {unknown[0]}: {hint}")
    return parsed


def require_writable(path: Path | None) -> None:
    """Raises UsageError if no file can be written there; None is no file."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a directory.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: {path.parent} is not a directory.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: permission denied.")


def _first_sentence(box: str) -> str:
    """The message in what tyro printed, on one line: it ends at a ruled line.

    Tyro draws a box around it; where the encoding has no lines to draw with, it prints a title
    and a line of dashes before it instead.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    message = rows if "╭" in text else rows[2:]
    rules = (i for i, row in enumerate(message) if row and set(row) <= {"─", "-"})
    sentence = " ".join(" ".join(message[: next(rules, None)]).split()) or text.strip()
    return re.sub(r"^Error parsing (?!--)\S+: ", "", sentence)


def _refuse_empty_paths(config: Any, args: Sequence[str]) -> None:
    """An empty path would mean the working directory; it is what an unset shell variable gives."""
    for flag, value in itertools.pairwise((*args, "--")):
        flag, equals, given = flag.partition("=")
        if (given if equals else value) == "" and Path in _types(_flags(config).get(flag)):
            raise UsageError(f"{flag} is empty: is a shell variable unset?")


def _types(kind: Any) -> tuple[Any, ...]:
    return (kind, *get_args(kind))


def _flags(config: Any) -> dict[str, Any]:
    """The type of each flag."""
    flags: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            flags |= _flags(kind)
        else:
            flags["--" + name.replace("_", "-")] = kind
    return flags


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line; what goes wrong is one sentence and an exit code.

    2 for what cannot be done as asked, 130 for Ctrl-C, 141 if nobody reads the output any more.
    """
    prog = os.path.basename(sys.argv[0])
    try:
        main(sys.argv[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush to
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{prog}: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
    except RunStopped as stop:
        print(f"{prog}: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
