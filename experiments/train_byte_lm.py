"""Trains an E88 language model on bytes. `--help` explains every flag."""

import dataclasses
from collections.abc import Sequence

from experiments.harness import cli, data, files, run_directory
from experiments.harness.config import TrainConfig, check_resumable
from experiments.harness.errors import UsageError
from experiments.harness.model_size import chosen_model, describe


def parse_args(args: Sequence[str]) -> TrainConfig:
    """The run that the command line asks for; a resumed run keeps the flags it had."""
    config = cli.parse(TrainConfig, args)
    if not config.resume:
        if (model := chosen_model(config)) is not None:
            config = cli.parse(TrainConfig, args, default=TrainConfig(model=model))
            print(f"{config.preset or config.params}: {describe(config.model)}")
        return _located(config, args)
    directory = config.out if config.out is not None else run_directory.newest_run()
    stored = run_directory.load_config(directory)
    asked = cli.parse(TrainConfig, [*args, "--out", str(directory)], default=stored)
    asked = _located(asked, args)
    check_resumable(stored, asked)
    return asked


def _located(config: TrainConfig, args: Sequence[str]) -> TrainConfig:
    """`config` with --data as it can be given anywhere."""
    if not config.data.data and "--data" in args:
        raise UsageError("--data names nothing: is a shell variable unset?")
    located = tuple(map(files.absolute, config.data.data))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=located))


def main(args: Sequence[str]) -> None:
    """Parses, looks at the data and the directory, then trains."""
    config = parse_args(args)
    if not config.resume:
        run_directory.check_claimable(config.out)
    elif config.out is not None and (done := run_directory.steps_done(config.out)) > config.steps:
        raise UsageError(f"the run in {config.out} has done {done} steps: raise --steps.")
    corpus = data.open_corpus(config)
    with run_directory.own(config.out, resume=config.resume) as directory:
        from experiments.harness.loop import (
            train,  # imports JAX, which --help and mistakes need not wait for
        )

        train(config, corpus, directory)


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
