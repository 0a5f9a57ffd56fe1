"""What a program tells its user on standard error: one sentence, without a traceback."""

import sys

from e88_jax.command import ProgramEnd


def warn(message: str) -> None:
    """Says that something is not as it should be, while the program goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class UsageError(ProgramEnd):
    """What was asked for cannot be done; the message says why and what would do. Exit code 2."""

    exit_code = 2


class RunStopped(ProgramEnd):
    """The run ended early, with its checkpoint written."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
