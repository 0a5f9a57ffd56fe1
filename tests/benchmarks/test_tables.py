"""The tables of the documentation are those of the recorded results."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tables
from e88_jax.hardware import GPUS
from e88_jax.sizing import PRESETS, compare


def rows_of(table: str) -> list[list[str]]:
    """The cells below the header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_pages_are_as_the_results_say(capsys: pytest.CaptureFixture[str]):
    code = tables.main(["--check"])
    assert capsys.readouterr().out == ""
    assert code == 0


def test_each_table_stands_in_one_place():
    text = "".join((tables.ROOT / page).read_text() for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", text)) == sorted(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_whole(name: str):
    found = re.findall(r"(?:^\|.*\n?)+", tables.TABLES[name](), re.MULTILINE)
    assert found
    for lines in (table.splitlines() for table in found):
        assert len(lines) >= 3
        assert len({line.count("|") for line in lines}) == 1
        assert all(len(cell) > 2 for cell in lines[1].split("|")[1:-1])


def test_numbers_are_those_of_the_files():
    shapes = tables.read(tables.RECURRENCE)["shapes"]
    first = rows_of(tables.recurrence())[0]
    assert float(first[1]) == pytest.approx(shapes[0]["passes"]["forward"]["ms"], abs=5e-4)
    assert float(first[2]) == pytest.approx(shapes[0]["passes"]["backward"]["ms"], abs=5e-4)

    points = tables.read(tables.STEP_GPU)["points"]
    for row, point in zip(rows_of(tables.train_step()), points.values(), strict=True):
        assert int(row[2].replace(",", "")) == round(point["tokens_per_second"])
        share = float(re.findall(r"\((\d+) %\)", row[5])[0]) / 100
        parts = point["part_ms"]
        both = parts["recurrence forward"] + parts["recurrence backward"]
        assert share == pytest.approx(both / sum(parts.values()), abs=0.005)

    rows = tables.read(tables.DECODE)["rows"]
    for row, measured in zip(rows_of(tables.decode()), rows, strict=True):
        assert int(row[3].replace(",", "")) == round(measured["decode_tokens_per_second"])


def test_the_headline_is_of_three_numbers_that_stand_in_the_tables():
    rates = [row[1] for row in rows_of(tables.headline())]
    assert len(rates) == 3
    assert rates[1] in [row[2] for row in rows_of(tables.train_step())]
    assert rates[2] in [row[3] for row in rows_of(tables.decode())]


def test_sizing_s_tables_have_every_gpu_and_preset():
    assert [row[0] for row in rows_of(tables.TABLES["gpus"]())] == [gpu.name for gpu in GPUS]
    assert [row[0] for row in rows_of(tables.TABLES["presets"]())] == list(PRESETS)
    families = [match.family for match in compare(500_000_000)]
    assert [row[0] for row in rows_of(tables.TABLES["comparison"]())] == families


def test_provenance_says_what_the_file_has():
    result = {"device": "X", "jax": "1.2", "date": "2026-01-02T03:04", "commit": "abc"}
    assert tables.provenance(result, {"clock_mhz": 5.0}, {"clock_mhz": None}) == (
        "X, 5 MHz, JAX 1.2, 2026-01-02, commit abc"
    )
    of_versions = {"devices": "2 x X", "versions": {"jax": "1.2"}}
    assert tables.provenance(of_versions) == "2 x X, JAX 1.2"


def test_a_table_of_each_commit_and_points_that_failed(monkeypatch: pytest.MonkeyPatch):
    points = tables.read(tables.SCALING[0])["points"]
    name, numbers = next(x for x in points.items() if ", data=1" in x[0])
    earlier = {**numbers, "commit": "abc"}
    record = {
        name: numbers,
        "7B, 8 x 2048 a GPU, fsdp=4": {"error": "out of memory"},
        "3B, 4 x 2048 a GPU, data=1": earlier,
    }
    monkeypatch.setattr(tables, "read", lambda _: {"points": record})
    monkeypatch.setattr(tables, "SCALING", ("one.json",))
    first, second = tables.over_gpus().split("\n\nNVIDIA")
    monkeypatch.setattr(tables, "SCALING", ("one.json", "another.json"))
    assert [tables.over_gpus().count(f"--json {x}") for x in tables.SCALING] == [2, 2]
    model = name.partition(",")[0]
    assert f"--models {model} 7B --gpus 1 4 " in first
    assert rows_of(first)[-1][:4] == ["7B", "fsdp=4", "8 x 2048", "out of memory"]
    assert "commit abc" in second
    assert "--models 3B --gpus 1 " in second
    assert len(rows_of(second)) == 1


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one page, with one table."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", ("page.md",))
    made: dict[str, Callable[[], str]] = {"one": lambda: "| a |\n| --- |\n| 1 |"}
    monkeypatch.setattr(tables, "TABLES", made)
    return tmp_path


def test_check_writes_nothing_and_a_run_does(root: Path, capsys: pytest.CaptureFixture[str]):
    page = root / "page.md"
    before = "Before.\n\n<!-- table: one -->\n| a |\n| --- |\n| 0 |\n<!-- end -->\n\nAfter.\n"
    page.write_text(before)
    assert tables.main(["--check"]) == 1
    assert "-| 0 |" in capsys.readouterr().out
    assert page.read_text() == before
    assert tables.main([]) == 0
    assert page.read_text() == (
        "Before.\n\n<!-- table: one -->\n\n| a |\n| --- |\n| 1 |\n\n<!-- end -->\n\nAfter.\n"
    )
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: two -->\n<!-- end -->\n", "no table 'two': choose from one."),
        ("<!-- table: one -->\n", "without its <!-- end -->"),
        ("<!-- table: one -->\n<!-- table: one -->\n<!-- end -->\n", "without its <!-- end -->"),
    ],
)
def test_a_wrong_mark_is_refused(root: Path, page: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.rewritten(page)
