"""Standard streams and exit codes of the programs. Imports no JAX."""

import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO, cast

PATIENCE_SECONDS = 10.0
"""Wait for a reader that does not read, in programs whose output is not their result."""

_STDOUT = "standard output"


class ProgramEnd(Exception):  # noqa: N818  (a planned end, not a fault of the program)
    """The program ends with this message, one sentence, and `exit_code`."""

    exit_code: int


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    prog: str | None = None,
    output_is_result: bool = True,
) -> NoReturn:
    """Runs `main` on the command line and exits.

    The exit code is `main`'s result (None is 0), the ProgramEnd's, 130 for Ctrl-C, or 2 for an
    OSError and for a host or device out of memory. Such an end prints one sentence to standard
    error; any other exception is a bug and keeps its traceback.

    Characters that a stream's encoding lacks are printed as escapes. Standard error drops what
    cannot be written.

    Args:
        main: called with the arguments.
        prog: start of messages; the program's file name by default.
        output_is_result: the first failed write to standard output ends the program, silently and
            with 141 if its reader has gone. If False, as where results are files, output that
            cannot be written is dropped, also if the reader has not read for `PATIENCE_SECONDS`.
    """
    _take_over_streams(output_is_result)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except Exception as error:
        cause = _refusal_of_the_machine(error)
        if isinstance(cause, BrokenPipeError) and cause.filename == _STDOUT:
            sys.exit(128 + signal.SIGPIPE)
        if cause is None and not isinstance(error, ProgramEnd):
            raise
        code = report(error, prog)
    except KeyboardInterrupt as error:
        code = report(error, prog)
    sys.exit(code)


def report(error: BaseException, prog: str | None = None) -> int:
    """Prints an end of the program to standard error, as `run` says; returns the exit code.

    Args:
        error: what ended it.
        prog: start of the message; the program's file name by default.
    """
    if isinstance(error, ProgramEnd):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 128 + signal.SIGINT
    elif (cause := _refusal_of_the_machine(error)) is not None:
        message, code = _sentence(cause), 2
    else:
        traceback.print_exception(error)
        return 1
    prog = os.path.basename(sys.argv[0]) if prog is None else prog
    print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return code


class _Stream(io.FileIO):
    """Standard output or error by its descriptor.

    Args:
        fd: the descriptor, which stays open.
        required: the first failed write raises an OSError that names standard output. Later ones,
            and all if False, are dropped.
    """

    def __init__(self, fd: int, required: bool):
        super().__init__(fd, "w", closefd=False)
        self._required = required
        self._patience = PATIENCE_SECONDS

    def write(self, b: Any, /) -> int:
        try:
            if self._required:
                written = super().write(b)
            else:
                # A pipe that is ready takes PIPE_BUF bytes without waiting.
                ready = select.select([], [self], [], self._patience)[1]
                self._patience = PATIENCE_SECONDS if ready else 0.0
                written = super().write(memoryview(b)[: select.PIPE_BUF]) if ready else None
        except OSError as error:
            if self._required:
                self._required = False
                error.filename = _STDOUT
                raise
            written = None
        return len(b) if written is None else written


def _open_stream(fd: int, encoding: str, required: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(fd, required)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def _take_over_streams(output_is_result: bool) -> None:
    # The next file opened would take a descriptor that the caller closed, and libraries would write
    # into it what is meant for standard error. Writing to /dev/null opened for reading fails.
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, fd, required in (("stdout", 1, output_is_result), ("stderr", 2, False)):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):  # else the caller's own, such as a test's
            encoding = "utf-8" if before is None else before.encoding
            setattr(sys, name, _open_stream(fd, encoding, required))


def _refusal_of_the_machine(error: BaseException) -> BaseException | None:
    """The OSError or lack of memory that `error` is or is explicitly caused by, if any."""
    if isinstance(error, BaseExceptionGroup):
        parts = cast("BaseExceptionGroup[BaseException]", error).exceptions
        causes = [_refusal_of_the_machine(part) for part in parts]
        return causes[0] if all(causes) else None
    if isinstance(error, OSError | MemoryError) and not isinstance(error, io.UnsupportedOperation):
        return error
    if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):  # JAX's
        return error
    return None if error.__cause__ is None else _refusal_of_the_machine(error.__cause__)


def _sentence(error: BaseException) -> str:
    if not isinstance(error, OSError):
        detail = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        where = "the host" if isinstance(error, MemoryError) else "the device"
        said = f"{where} is out of memory" + (f" ({detail})" if detail else "")
        return f"{said}: a smaller batch or model, shorter sequences or remat need less."
    said = error.strerror or str(error) or type(error).__name__
    names = [
        os.fsdecode(name) if isinstance(name, bytes) else f"{name}"
        for name in (error.filename, error.filename2)
        if name is not None
    ]
    if names:
        return f"{' to '.join(names)}: {said}."
    ours = os.path.dirname(__file__), os.path.dirname(os.path.abspath(sys.argv[0]))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(ours) and frame.filename != __file__:
            place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
            return f"{said}, in {place}: {frame.line}"
    return f"{said}."
