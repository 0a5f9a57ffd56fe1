"""The program that disturbs runs: how it judges an end, and its table."""

import signal
from pathlib import Path

import pytest

from benchmarks import kill_runs
from experiments.cli.errors import UsageError


def test_an_end_is_judged_by_exit_code_and_message(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    outcome = kill_runs.Outcome("SIGTERM", [])
    for said, code in (("stopped by SIGTERM at step 3", 128 + signal.SIGTERM), ("", 0)):
        errors.write_text(said)
        kill_runs.note_end(outcome, code, kill_runs.KINDS["SIGTERM"] | {0}, errors)
    assert (outcome.exit_codes, outcome.wrong) == ([143, 0], [])
    errors.write_text("Traceback (most recent call last)")
    kill_runs.note_end(outcome, 0, {0}, errors)
    kill_runs.note_end(outcome, 1, {0}, errors)
    assert [wrong.partition(":")[0] for wrong in outcome.wrong] == ["exit code 0", "exit code 1"]


def test_the_table_has_a_row_for_each_kind() -> None:
    outcomes = [
        kill_runs.Outcome("SIGKILL", [], [1.5], [-9, 0], identical=True),
        kill_runs.Outcome("SIGKILL", [], [0.5, 2.0], [-9, -9, 0], wrong=["metrics.jsonl differs"]),
        kill_runs.Outcome("full disk", [], [1.0], [1, 0], identical=True),
    ]
    *_, first, second = kill_runs.table(outcomes).splitlines()
    assert first == "| SIGKILL | 2 | 3 | -9: 3 | 1 | 1 |"
    assert second == "| full disk | 1 | 1 | 1: 1 | 1 | 0 |"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--runs 0", "--runs must be at least 1, got 0"),
        ("--json no/such/file", "no/such/file cannot be written"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        kill_runs.main(flags.split())
