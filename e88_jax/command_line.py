"""What the programs of this package do where their output cannot be written."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Exits with `main()`'s code; with 1 where its output cannot be written.

    That its reader is gone, as after `| head`, goes without saying; of a full disk there is a
    sentence on standard error.
    """
    try:
        code = main()
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except OSError as error:
        code = 1
        # Python writes at its exit what is still in the buffer, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            print(error, file=sys.stderr)
    sys.exit(code)
