"""SIGTERM, Ctrl-C and a closed terminal as requests to stop at the next step, or as Ctrl-C."""

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Self

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does. A SIGHUP that
    is ignored stays ignored."""
    before = {n: signal.signal(n, signal.default_int_handler) for n in _numbers()}
    try:
        yield
    finally:
        _restore(before)


class Interrupts:
    """A context in which the first SIGTERM, SIGINT or SIGHUP is noted in `received`.

    A SIGTERM or SIGINT a second later acts as usual. A later SIGHUP does nothing, as the shell and
    the kernel both send it. A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: Mapping[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {n: signal.signal(n, self._note) for n in _numbers()}
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
        elif number != _HANGUP and time.monotonic() - self._at > 1:  # not the same press, bouncing
            _restore(self._before)
            signal.raise_signal(number)


def _numbers() -> list[signal.Signals]:
    """Signals that ask a program to end, but for a SIGHUP that is ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        numbers.append(_HANGUP)
    return numbers


def _restore(before: Mapping[signal.Signals, object]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
