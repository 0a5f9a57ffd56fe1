"""Errors and warnings for the user: one sentence on standard error, no traceback."""

import sys

from e88_jax.command import ProgramEnd


def warn(message: str) -> None:
    """Prints a warning; the program goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class UsageError(ProgramEnd):
    """A request that cannot be met; the message says why and what would do. Exit code 2."""

    exit_code = 2


class RunStopped(ProgramEnd):
    """An early end of the run, its checkpoint written.

    Args:
        message: why, and what would do.
        exit_code: of the program.
        of_all: every process of the run ends so, at the same step.
    """

    def __init__(self, message: str, exit_code: int, *, of_all: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.of_all = of_all
