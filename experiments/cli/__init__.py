"""Command lines from dataclasses: help by tyro, mistakes in one sentence, bounds of numbers."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from e88_jax.command import run as run
from e88_jax.config import LMConfig

from . import model_flags
from .errors import UsageError

Config = TypeVar("Config")

MIN_COLUMNS = 60
"""Narrowest layout of the help; in a few columns tyro needs minutes and gigabytes."""

INT32_LIMIT = 2**31
"""Steps, tokens and sizes are counted in int32."""
FLOAT32_LIMIT = 1e38
"""Rates and norms are kept in float32."""


def parse(
    config: type[Config],
    args: Sequence[str],
    default: Config | None = None,
    *,
    complete: bool = True,
) -> Config:
    """A `config` from command-line `args`; other fields are those of `default`.

    Args:
        config: a dataclass.
        args: the command line.
        default: None for the defaults of the class.
        complete: refuse unknown flags. Without, they are left to a parse with another default,
            whose model may have other flags.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
        SystemExit: after printing the help for `--help`.
    """
    _refuse_empty_paths(config, args)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _wide_enough():
            parsed, unknown = tyro.cli(
                config,
                args=args,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=model_flags.registry(args),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UsageError(_first_sentence(printed.getvalue())) from None
    if unknown and complete:
        kind = model_flags.kind_of(parsed, args)
        known = list(_flags(config, kind))
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
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


def _first_sentence(box: str) -> str:
    """The message printed by tyro, on one line; a ruled line ends it.

    Tyro draws a box around it, or, in an encoding without box characters, prints a title and a line
    of dashes before it.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    message = rows if "╭" in text else rows[2:]
    rules = (i for i, row in enumerate(message) if row and set(row) <= {"─", "-"})
    sentence = " ".join(" ".join(message[: next(rules, None)]).split()) or text.strip()
    return re.sub(r"^Error parsing (?!--)\S+: ", "", sentence)


def _refuse_empty_paths(config: Any, args: Sequence[str]) -> None:
    """Raises UsageError for an empty path, as from an unset shell variable."""
    for flag, value in itertools.pairwise((*args, "--")):
        flag, equals, given = flag.partition("=")
        if (given if equals else value) == "" and Path in _types(_flags(config).get(flag)):
            raise UsageError(f"{flag} is empty: is a shell variable unset?")


def _types(kind: Any) -> tuple[Any, ...]:
    return (kind, *get_args(kind))


def field_types(config: Any) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _flags(config: Any, mixer: str = "e88") -> dict[str, Any]:
    """The type of each flag, with a model's flags for this kind of mixer."""
    types = model_flags.flag_types(mixer) if config is LMConfig else field_types(config)
    flags: dict[str, Any] = {}
    for name, kind in types.items():
        if dataclasses.is_dataclass(kind):
            flags |= _flags(kind, mixer)
        else:
            flags["--" + name.replace("_", "-")] = kind
    return flags


def require(
    config: object,
    *names: str,
    minimum: float | None = None,
    above: float | None = None,
    below: float = INT32_LIMIT,
) -> None:
    """Holds fields of `config`, each a number, numbers or None, to bounds; NaN is never within.

    Raises:
        ValueError: one is out of bounds; the message names it as a flag.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is None:
                continue
            if minimum is not None and not number >= minimum:
                bound = f"at least {minimum}"
            elif above is not None and not number > above:
                bound = f"above {above}"
            elif not number < below:
                bound = f"below {_shown(below)}"
            else:
                continue
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {number}.")


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound > 1 and bound & (bound - 1) == 0:
        return f"2**{bound.bit_length() - 1}"
    return f"{bound:.9g}"
