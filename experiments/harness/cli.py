"""Command lines from dataclasses: help by tyro, mistakes in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from e88_jax.command import run as run

from .errors import UsageError

Config = TypeVar("Config")

MIN_COLUMNS = 60
"""Of a terminal that help is laid out for; in a few columns tyro needs minutes and gigabytes."""


def parse(config: type[Config], args: Sequence[str], default: Config | None = None) -> Config:
    """A `config` from command-line `args`; what they do not name is as in `default`.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
        SystemExit: after printing the help that `--help` asks for.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _wide_enough():
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


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(MIN_COLUMNS, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def require_folder_of(path: Path | None) -> None:
    """Raises UsageError if a file cannot be written there because there is no such folder."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: {path.parent} is not a directory.")


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


def _flags(config: Any) -> Iterator[str]:
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield from _flags(types[field.name])
        else:
            yield "--" + field.name.replace("_", "-")
