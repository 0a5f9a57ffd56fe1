"""SIGTERM, Ctrl-C and a closed terminal as requests to stop at the next step, or as Ctrl-C."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
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

    Args:
        stop_at: for a run of several processes, `Processes.stop_at`, which says when all stop.
            JAX's distributed runtime then takes SIGTERM, and gets one for any other signal.
    """

    def __init__(self, stop_at: Callable[[int], bool] | None = None) -> None:
        self._stop_at = stop_at
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: Mapping[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        of_runtime = [] if self._stop_at is None else [signal.SIGTERM]
        numbers = [n for n in _numbers() if n not in of_runtime]
        self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def at(self, step: int) -> signal.Signals | None:
        """The signal for which the run stops at the end of this step, if it does."""
        if self._stop_at is None:
            return self.received
        return (self.received or signal.SIGTERM) if self._stop_at(step) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            if self._stop_at is not None:
                signal.raise_signal(signal.SIGTERM)
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
