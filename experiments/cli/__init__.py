"""Command lines from dataclasses: help by tyro, mistakes in one sentence, bounds of numbers."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_type_hints, runtime_checkable

import tyro

from e88_jax.command import run as run
from e88_jax.config import LMConfig

from . import model_flags
from .errors import UsageError
from .names import flag_in, flag_of, nearest

Config = TypeVar("Config")

MIN_COLUMNS = 60
"""Narrowest layout of the help; in a few columns tyro needs minutes and gigabytes."""

INT32_LIMIT = 2**31
"""Steps, tokens and sizes are counted in int32."""
FLOAT32_LIMIT = 1e38
"""Rates and norms are kept in float32."""


@runtime_checkable
class HintsAtFlags(Protocol):
    """A configuration that knows flags which others of its kind have."""

    @classmethod
    def hint_at(cls, flag: str) -> str | None:
        """Advice for a flag that this configuration lacks; None for any other flag."""
        ...


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
        complete: read every flag. Without, the model is the default's and unknown flags are left:
            both are for a parse with a default that the other flags choose.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
        SystemExit: after printing the help for `--help`.
    """
    shape = config if default is None else default
    _refuse_empty_paths(shape, args)
    model = getattr(shape, "model", None)
    layers, fixed = None, None
    if isinstance(model, LMConfig):
        if complete or {"-h", "--help"} & set(args):
            layers = model_flags.layers_of(model, args)
        else:
            fixed = model
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _wide_enough():
            parsed, unknown = tyro.cli(
                config,
                args=args,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=model_flags.registry(layers, fixed=fixed),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        # A required flag that is missing may be there in the other spelling.
        if layers is not None and (word := _misspelt(args, shape, layers)):
            raise UsageError(_unknown(word, shape, layers)) from None
        raise UsageError(_first_sentence(printed.getvalue())) from None
    if unknown and complete:
        raise UsageError(_unknown(unknown[0], shape, layers))
    return parsed


def _misspelt(args: Sequence[str], config: Any, layers: model_flags.Layers) -> str | None:
    """The first word of a command line that is a layer's flag in the other spelling."""
    others = layers.misspelt().keys() - {*_flags(config), *layers.flags()}
    return next((word for word in args if flag_in(word) in others), None)


def _unknown(word: str, config: Any, layers: model_flags.Layers | None) -> str:
    """Says that a word is no flag, and what would do."""
    flags, misspelt, hint = list(_flags(config)), {}, None
    if layers is not None:
        flags += layers.flags()
        misspelt = layers.misspelt()
        hint = layers.hint_at_kind(flag_in(word))
    if hint is None and isinstance(config, HintsAtFlags):
        hint = config.hint_at(flag_in(word))
    if hint is None and (near := nearest(word, flags, misspelt)):
        hint = f"did you mean {near}?"
    return f"unknown argument {word}: {hint or '--help lists the flags.'}"


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
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _flags(config: Any) -> dict[str, Any]:
    """The type of each flag of a dataclass or an instance of it, but for those of a model."""
    flags: dict[str, Any] = {}
    for name, kind in field_types(config).items():
        if kind is LMConfig:
            continue
        if dataclasses.is_dataclass(value := getattr(config, name, None)):
            kind = type(value)  # may be a subclass of the field's
        flags |= _flags(kind) if dataclasses.is_dataclass(kind) else {flag_of(name): kind}
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
            raise ValueError(f"{flag_of(name)} must be {bound}, got {number}.")


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound > 1 and bound & (bound - 1) == 0:
        return f"2**{bound.bit_length() - 1}"
    return f"{bound:.9g}"
