"""What a run shows on a terminal and elsewhere."""

import pytest
from harness.progress import Report


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
