"""Trains an E88 language model on bytes. `--help` explains every flag."""

from collections.abc import Sequence

from experiments import cli
from experiments.harness import program
from experiments.tasks.bytes import ByteLMConfig


def main(args: Sequence[str]) -> None:
    """Parses, checks the directory, opens the data, trains."""
    program.main(ByteLMConfig, args)


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
