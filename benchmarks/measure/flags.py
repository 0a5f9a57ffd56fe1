"""Flags that timing programs share: a preset of the sizing guide, a file for the results."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from e88_jax.sizing import find_preset
from experiments import cli
from experiments.cli.errors import UsageError

Config = TypeVar("Config")


def parse_with_preset(config_type: type[Config], args: Sequence[str]) -> Config:
    """A `config_type` from command-line `args`; flags of the model change its `preset`, if any.

    Raises:
        UsageError: as `cli.parse`, or there is no such preset.
    """
    config: Any = cli.parse(config_type, args, complete=False)
    default = None
    if config.preset is not None:
        try:
            default = dataclasses.replace(config, model=find_preset(config.preset).config)
        except ValueError as error:
            raise UsageError(str(error)) from None
    return cli.parse(config_type, args, default=default)


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
