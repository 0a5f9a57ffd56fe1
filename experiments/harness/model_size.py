"""The model of a run that names a preset or a budget."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from e88_jax import hardware
from e88_jax.config import LMConfig
from e88_jax.sizing import count_params, d_inner_of, find_preset, parse_params, solve

from . import cli
from .config import TrainConfig
from .errors import UsageError

Config = TypeVar("Config")


def parse_with_preset(config_type: type[Config], args: Sequence[str]) -> Config:
    """A `config_type` from command-line `args`: its `preset`, if any, is what flags of the `model`
    change.

    Raises:
        UsageError: as `cli.parse`, or there is no such preset.
    """
    config: Any = cli.parse(config_type, args)
    if config.preset is None:
        return config
    default = dataclasses.replace(config, model=_preset(config.preset))
    return cli.parse(config_type, args, default=default)


def _preset(name: str) -> LMConfig:
    try:
        return find_preset(name).config
    except ValueError as error:
        raise UsageError(str(error)) from None


def chosen_model(config: TrainConfig) -> LMConfig | None:
    """What --preset or --params asks for, or None if neither is given.

    Raises:
        UsageError: there is no such preset, budget or GPU, or flags that contradict each other.
    """
    if config.preset is not None and config.params is not None:
        raise UsageError("--preset and --params both choose the model: give one of them.")
    if config.gpu is not None and config.params is None:
        raise UsageError(f"--gpu {config.gpu} is for --params, which is not given.")
    if config.preset is not None:
        return _preset(config.preset)
    try:
        if config.params is not None:
            gpu = hardware.detect() if config.gpu is None else hardware.find(config.gpu)
            return solve(parse_params(config.params), gpu=gpu)[0].config
    except ValueError as error:
        raise UsageError(str(error)) from None
    return None


def describe(model: LMConfig) -> str:
    """One line about a model's size."""
    layer = model.layer
    return (
        f"dim {layer.dim}, {layer.n_heads} heads of {layer.n_state} (d_inner {d_inner_of(model)}), "
        f"depth {model.depth}: {count_params(model):,} parameters"
    )
