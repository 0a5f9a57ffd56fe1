"""The program: a suite runs, goes on where it was stopped, and ends with tables and plots."""

import csv
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.image import imread

from experiments import expressivity
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness.config import OptimizerConfig
from experiments.tasks.synthetic import MultiQuery, Parity, Recall
from experiments.tasks.synthetic.reading import Reading
from experiments.trials import running, suites
from experiments.trials.controls import CONTROLS, Size
from experiments.trials.records import Records
from experiments.trials.suites import SUITES, Problem, Suite

TINY = Suite(
    about="two problems of a moment",
    problems={
        "parity": Problem.at(Parity(), 4, 4, 8),
        "recall": Problem.at(Recall(keys=3, values=3, pairs=1), 5, 4, 10),
    },
    sizes=(Size(dim=8, depth=1, n_heads=1, n_state=4),),
    models=("e88", "lstm"),
    dtypes=("float32",),
    seeds=(1, 2),
    optimizer=OptimizerConfig(warmup_steps=1),
    batch_size=2,
    rates=(1e-3, 1e-2),
    read_batches=1,
    read_batch_size=4,
)


_compile, _compiled = running.Runner._compile, dict[Any, Any]()


def compile_once(runner: Any, work: running.Work) -> Any:
    key = work.trial, work.lanes, work.readings, runner._device
    if key not in _compiled:
        _compiled[key] = _compile(runner, work)
    return _compiled[key]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of these tests, whose programs are compiled once for all of them."""
    monkeypatch.setitem(SUITES, "quick", TINY)
    monkeypatch.setattr(running.Runner, "_compile", compile_once)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "runs.jsonl").read_text().splitlines()]


def test_a_suite_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "suite")]
    directory = tmp_path / "suite"

    # One cell, then nothing of it again.
    some = ["quick", "--problems", "parity", "--models", "e88", *out]
    expressivity.main(some)
    first = lines(directory)
    assert [x["kind"] for x in first] == ["search"] * 2 + ["run"] * 2
    assert [x["seed"] for x in first] == [suites.SEARCH_SEED] * 2 + [1, 2]
    searched = {x["learning_rate"]: x for x in first[:2]}
    assert set(searched) == set(TINY.rates)
    assert {x["learning_rate"] for x in first[2:]} == {running.best_rate(searched)}
    assert [x["steps"] for x in first] == [2, 2, 4, 4]
    assert set(first[2]["accuracy"]) == set(first[2]["chance"]) == {"4", "8"}
    expressivity.main(some)
    assert lines(directory) == first

    # A time that is over at once stops with what there is.
    with pytest.raises(RunStopped, match="goes on"):
        expressivity.main(["quick", "--minutes", "1e-9", *out])
    assert lines(directory) == first

    # The rest; a line that a kill has cut short is made again.
    with (directory / "runs.jsonl").open("a") as file:
        file.write('{"kind": "run", "prob')
    capsys.readouterr()
    expressivity.main(["quick", "--problems", "parity", *out])
    every = lines(directory)
    assert every[: len(first)] == first
    assert len(every) == 2 * len(first)
    report = (directory / "report.md").read_text()
    assert "| E88 |" in report
    assert "| LSTM |" in report
    with (directory / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    runs = [x for x in every if x["kind"] == "run"]
    assert len(rows) == sum(len(run["accuracy"]) for run in runs)
    assert {row["model"] for row in rows} == {"e88", "lstm"}
    assert imread(directory / "accuracy_8x1_float32.png").shape[0] > 100


def test_cells_that_fail_are_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running.Runner.run

    def failing(self: Any, work: Any, advanced: Any) -> None:
        if work.cell.model == "e88":
            raise jax.errors.JaxRuntimeError("out of memory\nand more")
        run(self, work, advanced)

    monkeypatch.setattr(running.Runner, "run", failing)
    directory = tmp_path / "suite"
    parity = ["quick", "--problems", "parity", "--out", str(directory)]
    with pytest.raises(RunStopped, match=r"^failed: parity, e88, 8 x 1[^;]*\. The same") as stopped:
        expressivity.main(parity)
    assert stopped.value.exit_code == 1
    assert "failed, out of memory\n" in capsys.readouterr().out
    assert {line["model"] for line in lines(directory)} == {"lstm"}
    assert "| LSTM |" in (directory / "report.md").read_text()
    monkeypatch.setattr(running.Runner, "run", run)
    expressivity.main(parity)
    assert {line["model"] for line in lines(directory)} == {"e88", "lstm"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_suite_that_is_stopped_writes_its_tables(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = ["quick", "--problems", "parity", "--out", str(tmp_path)]
    run = running.Runner.run

    def stopped(self: Any, work: running.Work, advanced: Callable[[int], None]) -> None:
        run(self, work, advanced)
        if work.kind == "run":
            os.kill(os.getpid(), number)
            while True:  # until the main thread has taken notice
                time.sleep(0.01)
                advanced(work.lane_steps)

    monkeypatch.setattr(running.Runner, "run", stopped)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        expressivity.main(suite)
    assert signal.getsignal(number) is before
    done = lines(tmp_path)
    assert any(x["kind"] == "run" for x in done)
    assert "parity" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(running.Runner, "run", run)
    expressivity.main(suite)
    assert lines(tmp_path)[: len(done)] == done


def test_the_list_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expressivity.main(["quick", "--list", "--out", str(tmp_path / "suite")])
    said = capsys.readouterr().out
    assert "4 cells of 2 seeds, 4 left" in said
    assert "parity, lstm, 8 x 1, float32: search, 2 x 2 steps" in said
    assert not (tmp_path / "suite").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problems", "parety"], ["parety", "'parity'", "'recall'"]),
        (["--models", "e89"], ["e89", "e88_linear"]),
        (["--depths", "3"], ["[1]", "[3]"]),
        (["--minutes", "0"], ["--minutes", "above 0"]),
        (["--seeds", "-1"], ["--seeds", "-1"]),
        (["--modles", "e88"], ["--modles", "--models"]),
    ],
)
def test_mistakes_cost_nothing(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as said:
        expressivity.main(["quick", "--out", str(tmp_path / "suite"), *flags])
    for word in words:
        assert word in str(said.value)
    assert not (tmp_path / "suite").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="--out"):
        expressivity.main(["quick", "--out", str(tmp_path / "file" / "suite")])
    assert (tmp_path / "file").read_text() == "mine"


class TestSuites:
    """The data of the real suites."""

    def test_the_author_s(self) -> None:
        suite = SUITES["author"]
        assert len(suite.problems) == 12
        assert {p.steps for p in suite.problems.values()} == {10_000}
        assert suite.optimizer.optimizer == "schedule_free"
        assert (suite.rates, suite.seeds, suite.batch_size) == ((3e-4,), (42, 123, 456), 32)

    @pytest.mark.parametrize("name", [name for name in SUITES if name != "quick"])
    def test_every_cell_can_be_built(self, name: str, tmp_path: Path) -> None:
        suite = SUITES[name]
        left = running.left(suite, Records(tmp_path / "runs.jsonl"))
        assert len({work.cell for work in left}) == len(list(running.cells(suite)))
        for problem in suite.problems.values():
            problem.task.check_length(problem.length)
            for reading in problem.readings:
                reading.task.check_length(reading.length)
                assert reading.task.vocab_size == problem.task.vocab_size

    def test_searches_have_four_rates(self) -> None:
        for name in ("groups", "formal", "recall", "ablations"):
            assert len(SUITES[name].rates) >= 4
        for name in ("groups", "formal", "recall"):
            assert set(SUITES[name].models) == set(CONTROLS)


def test_lines_are_put_in_the_suite_s_order() -> None:
    def line(problem: str, model: str, seed: int, depth: int = 1) -> dict[str, Any]:
        cell = {"problem": problem, "dim": 8, "depth": depth, "model": model, "dtype": "float32"}
        return {**cell, "kind": "run", "seed": seed, "learning_rate": 0.1}

    expected = [
        line("parity", "e88", 2),
        line("parity", "lstm", 1),
        line("parity", "lstm", 2),
        line("parity", "e88", 1, depth=4),
        line("recall", "e88", 1),
        line("recall", "of before", 1),
        line("of before", "e88", 1),
    ]
    assert suites.in_order("quick", [expected[i] for i in (6, 4, 2, 5, 3, 0, 1)]) == expected


def test_names_of_readings() -> None:
    assert running.name(Reading(task=Parity(), length=64)) == "64"
    assert running.name(Reading(task=Parity(min_length=40), length=256)) == "40 to 256"
    pairs = MultiQuery(lengths=(64,), pairs=(4,), shares=(1.0,))
    assert running.name(Reading(task=pairs, length=64)) == "64, 4 pairs"


def test_the_best_rate_breaks_ties_by_loss() -> None:
    def search(accuracy: float, loss: float) -> dict[str, Any]:
        return {"training_accuracy": [0.0, accuracy], "training_loss": [0.0, loss]}

    def best(**rates: tuple[float, float]) -> float:
        found = {
            float(name): {**search(*x), "learning_rate": float(name)} for name, x in rates.items()
        }
        return running.best_rate(found)

    assert best(**{"0.1": (0.5, 1.0), "0.2": (0.9, 2.0)}) == 0.2
    assert best(**{"0.1": (1.0, 0.1), "0.2": (1.0, 0.01)}) == 0.2
    assert best(**{"0.1": (0.5, 1.0), "0.2": (0.5, float("nan"))}) == 0.1


def test_a_part_of_a_suite() -> None:
    part = running.selected(TINY, problems=["recall"], dtypes=["bfloat16"], seeds=[5])
    expected = dataclasses.replace(
        TINY, problems={"recall": TINY.problems["recall"]}, dtypes=("bfloat16",), seeds=(5,)
    )
    assert part == expected
    assert running.selected(TINY) == TINY
    assert running.selected(TINY, models=["gdn"], depths=[1]).models == ("gdn",)


def test_runs_of_another_protocol_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["quick", "--problems", "parity", "--models", "e88", "--out", str(tmp_path / "suite")]
    expressivity.main(flags)
    before = lines(tmp_path / "suite")
    other = dataclasses.replace(TINY.optimizer, weight_decay=0.5)
    monkeypatch.setitem(SUITES, "quick", dataclasses.replace(TINY, optimizer=other))
    with pytest.raises(UsageError, match=r"with weight_decay 0\.1, not 0\.5: --out"):
        expressivity.main([*flags, "--seeds", "3"])
    assert lines(tmp_path / "suite") == before
