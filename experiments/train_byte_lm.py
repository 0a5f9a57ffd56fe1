"""Trains an E88 language model on bytes. `--help` explains every flag."""

from collections.abc import Sequence

from harness import cli, run_directory
from harness.config import TrainConfig, check_resumable
from harness.model_size import chosen_model, describe


def parse_args(args: Sequence[str]) -> TrainConfig:
    """The run that the command line asks for; a resumed run keeps the flags it had."""
    config = cli.parse(TrainConfig, args)
    if not config.resume:
        if (model := chosen_model(config)) is None:
            return config
        config = cli.parse(TrainConfig, args, default=TrainConfig(model=model))
        print(f"{config.preset or config.params}: {describe(config.model)}")
        return config
    directory = config.out if config.out is not None else run_directory.newest_run()
    stored = run_directory.load_config(directory)
    asked = cli.parse(TrainConfig, [*args, "--out", str(directory)], default=stored)
    check_resumable(stored, asked)
    return asked


def main(args: Sequence[str]) -> None:
    """Parses, then trains."""
    config = parse_args(args)
    with run_directory.own(config.out, resume=config.resume) as directory:
        from harness.loop import train  # imports JAX, which --help and mistakes need not wait for

        train(config, directory)


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
