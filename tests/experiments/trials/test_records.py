"""The file of results: what is whole is kept, what is done is known."""

from pathlib import Path
from typing import Any

import pytest

from experiments.cli.errors import UsageError
from experiments.trials.records import Cell, Records, groups

CELL = Cell("parity", 8, 1, "e88", "float32")


def line(kind: str = "run", cell: Cell = CELL, **values: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        **cell._asdict(),
        "seed": 0,
        "learning_rate": 0.1,
        "protocol": {},
        **values,
    }


def test_lines_are_added_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    records = Records(path)
    assert records.lines == []
    records.add([line(seed=3), line("search", learning_rate=0.5)])
    records.add([line(seed=4)])
    again = Records(path)
    assert again.lines == records.lines
    assert again.seeds(CELL) == {3, 4}
    assert list(again.search(CELL)) == [0.5]
    other = CELL._replace(dtype="bfloat16")
    assert again.seeds(other) == set()
    assert again.search(other) == {}


def test_a_line_cut_short_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    Records(path).add([line(seed=1), line(seed=2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    records = Records(path)
    assert "cut short" in capsys.readouterr().err
    assert records.seeds(CELL) == {1}
    records.add([line(seed=2)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["{}\n", "[1]\n", "no\n", '{"kind": "run"}\n'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.jsonl"
    Records(path).add([line()])
    before = path.read_text() + text
    path.write_text(before)
    with pytest.raises(UsageError, match=r"line 2 of .*runs\.jsonl"):
        Records(path)
    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    records = Records(tmp_path / "missing" / "runs.jsonl")
    with pytest.raises(UsageError, match=r"runs\.jsonl cannot be written"):
        records.add([line()])
    assert records.lines == []


def readings(*seeds: dict[str, float]) -> list[dict[str, Any]]:
    return [line(seed=i, accuracy=accuracy) for i, accuracy in enumerate(seeds)]


def test_the_horizon_is_the_greatest_length_that_every_seed_solves() -> None:
    lines = readings({"8": 1.0, "16": 0.995, "32": 0.7}, {"8": 1.0, "16": 0.99, "32": 1.0})
    (group,) = groups(lines).values()
    assert group.horizon() == 16
    assert group.horizon(solved=0.5) == 32
    assert group.values("32") == [0.7, 1.0]


def test_a_gap_ends_the_horizon() -> None:
    (group,) = groups(readings({"8": 1.0, "16": 0.5, "32": 1.0})).values()
    assert group.horizon() == 8


def test_there_may_be_no_horizon() -> None:
    (group,) = groups(readings({"8": 0.98, "16": 1.0})).values()
    assert group.horizon() is None
    (group,) = groups(readings({"40 to 256": 1.0})).values()
    assert group.horizon() is None
