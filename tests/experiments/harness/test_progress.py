"""What a run shows on a terminal and elsewhere."""

import contextlib
import os
import sys

import pytest

from e88_jax import command
from experiments.harness.progress import Report


@pytest.mark.parametrize("terminal", [False, True])
def test_report(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv(
        "FORCE_COLOR", raising=False
    )
    monkeypatch.setenv("COLUMNS", "100")
    with Report(steps=30, start=10) as report:
        report.advance(20, "loss [bold]1.5")
        report.say("a sample: [red]x")
        report.advance(30, "loss 1.25")
    printed = capsys.readouterr().out
    assert "a sample: [red]x" in printed
    if terminal:
        assert "\x1b[" in printed
        assert "30/30" in printed
        assert "1.25" in printed
    else:
        assert "step 20/30  loss [bold]1.5\n" in printed
        assert "step 30/30  loss 1.25\n" in printed


def test_a_terminal_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", command._open_stream(slave, "ascii", required=False))
    with Report(steps=30) as report:
        report.say("größer :bug:")
        report.show(10, "loss 1.5")
        seen = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                seen += os.read(master, 1 << 16)
        os.close(master)
        report.advance(20, "loss 1.25")
        report.say("nobody hears this")
        report.advance(30, "loss 1")
    os.close(slave)
    assert b"gr\\xf6\\xdfer :bug:" in seen
