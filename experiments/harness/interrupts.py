"""SIGTERM, Ctrl-C and a closed terminal as requests to stop at the next step."""

import signal
import time
from types import FrameType
from typing import Self

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupts:
    """A context in which the first SIGTERM, SIGINT or SIGHUP is noted in `received`.

    A SIGTERM or SIGINT a second later acts as usual. A later SIGHUP does nothing, as the shell and
    the kernel both send it. A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
            numbers.append(_HANGUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
        elif number != _HANGUP and time.monotonic() - self._at > 1:  # not the same press, bouncing
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
