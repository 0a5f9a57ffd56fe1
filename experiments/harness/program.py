"""A training program: from its command line to a run."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from e88_jax import hardware
from e88_jax.config import E88Config, LMConfig
from e88_jax.sizing import find_preset, parse_params, solve
from experiments import cli
from experiments.cli.errors import UsageError
from experiments.cli.model_flags import kinds_of

from . import processes, run_directory
from .config import TrainConfig, check_resumable
from .mesh_sizes import check_model, parse_mesh
from .run import Run

Training = TypeVar("Training", bound=TrainConfig)


def main(kind: type[TrainConfig], args: Sequence[str]) -> None:
    """Parses, checks the directory, opens the data, trains."""
    config = parse_args(kind, args)
    check_model(parse_mesh(config.mesh, config.batch.batch_size), config.model)
    with processes.joined(config.launch) as here:
        here.agree(lambda: check_directory(config))
        task = config.open_task()
        with Run(config, task, here) as run:
            from .train import train  # imports JAX, which --help and mistakes need not wait for

            train(config, task, run)


def check_directory(config: TrainConfig) -> None:
    """Raises UsageError if the run cannot start in its directory, or has done its steps there."""
    if not config.resume:
        run_directory.check_claimable(config.out, config.task.FILES)
    elif config.out is not None and (done := run_directory.steps_done(config.out)) > config.steps:
        raise UsageError(f"the run in {config.out} has done {done} steps: raise --steps.")


def parse_args(kind: type[Training], args: Sequence[str]) -> Training:
    """The configuration of the command line; a resumed run keeps its flags.

    Raises:
        UsageError: a flag is wrong, or the run to resume has other flags.
    """
    config = cli.parse(kind, args, kind.defaults(args), complete=False)
    if not config.resume:
        model = chosen_model(config)
        default = config.with_defaults(config.model if model is None else model)
        config = cli.parse(kind, args, default=default)
        if model is not None:
            print(f"{config.preset or config.params}: {describe(config.model)}")
        return _located(config, args)
    directory = config.out if config.out is not None else run_directory.newest_run()
    stored = run_directory.load_config(directory, kind)
    asked = _located(cli.parse(kind, [*args, "--out", str(directory)], default=stored), args)
    check_resumable(stored, asked)
    return asked


def _located(config: Training, args: Sequence[str]) -> Training:
    return dataclasses.replace(config, task=config.task.located(args))


def chosen_model(config: TrainConfig) -> LMConfig | None:
    """The model of --preset or --params; None without either.

    Raises:
        UsageError: there is no such preset, budget or GPU, or flags that contradict each other.
    """
    if config.preset is not None and config.params is not None:
        raise UsageError("--preset and --params both choose the model: give one of them.")
    if config.gpu is not None and config.params is None:
        raise UsageError(f"--gpu {config.gpu} is for --params, which is not given.")
    try:
        if config.preset is not None:
            return find_preset(config.preset).config
        if config.params is not None:
            gpu = hardware.detect_gpu() if config.gpu is None else hardware.find_gpu(config.gpu)
            return solve(parse_params(config.params), gpu=gpu)[0].config
    except ValueError as error:
        raise UsageError(str(error)) from None
    return None


def describe(model: LMConfig) -> str:
    """Sizes of a model, in one line."""
    layer = model.layers[0]
    mixers = ",".join(kinds_of(model))
    if len(set(model.layers)) == 1 and isinstance(layer, E88Config):
        d_inner = layer.n_heads * layer.n_state
        mixers = f"{layer.n_heads} heads of {layer.n_state} (d_inner {d_inner})"
    return f"dim {model.dim}, {mixers}, depth {model.depth}: {model.count_params():,} parameters"
