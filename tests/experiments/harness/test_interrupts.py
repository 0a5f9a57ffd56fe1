"""Signals as a request to stop."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from experiments.harness.interrupts import Interrupts, as_ctrl_c


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    # Whoever runs the tests by nohup ignores hangups.
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_is_noted_and_what_was_before_comes_back(number: signal.Signals):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.received is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # the same press, bouncing
        assert interrupts.received is number
    assert signal.getsignal(number) is before


def test_a_second_one_later_acts_as_usual(number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    seen = []
    signal.signal(number, lambda n, _: seen.append(n))
    now = 0.0
    monkeypatch.setattr("experiments.harness.interrupts.time.monotonic", lambda: now)
    with Interrupts():
        signal.raise_signal(number)
        assert seen == []
        now = 1.5
        signal.raise_signal(number)
    assert seen == ([] if number == signal.SIGHUP else [number])


@pytest.mark.parametrize("context", [Interrupts, as_ctrl_c])
def test_a_hangup_that_is_ignored_stays_so(context: Any):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with context() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts is None or interrupts.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_as_ctrl_c(number: signal.Signals):
    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), as_ctrl_c():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
