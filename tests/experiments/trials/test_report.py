"""Tables of results: means, lowest seeds, horizons, states."""

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from experiments.trials import controls, plot, report
from experiments.trials.suites import SUITES

PROTOCOL = {"length": 8, "batch_size": 4}


def run(model: str, seed: int, *accuracy: float, grows: bool = False, **cell: Any) -> report.Record:
    lengths = [str(8 * 2**i) for i in range(len(accuracy))]
    return {
        "kind": "run",
        "problem": "parity",
        "dim": 16,
        "depth": 1,
        "model": model,
        "dtype": "float32",
        **cell,
        "seed": seed,
        "protocol": PROTOCOL,
        "learning_rate": 0.001,
        "steps": 100,
        "parameters": 1234,
        "state": {n: 64 * (int(n) if grows else 1) for n in lengths},
        "accuracy": dict(zip(lengths, accuracy, strict=True)),
        "chance": dict.fromkeys(lengths, 0.5),
        "seconds": 6.0,
        "lanes": 2,
        "device": "cpu",
        "jax": "1",
        "commit": "abc",
    }


LINES = [
    run("e88", 0, 1.0, 0.995, 0.992),
    run("e88", 1, 1.0, 1.0, 0.991),
    run("gdn", 0, 1.0, 0.99, 0.6),
    run("gdn", 1, 0.992, 0.98, 0.7),
    run("transformer", 0, 0.7, 0.6, 0.5, grows=True),
    run("unknown", 0, 1.0, 1.0, 1.0, depth=2),
    {**run("e88", 2, 0.0, 0.0, 0.0), "kind": "search"},
]


def rows(text: str, model: str) -> list[list[str]]:
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in table if row[0] == model]


def test_summary_and_lengths() -> None:
    text = report.markdown(LINES)
    summary, by_length = rows(text, "E88")
    assert summary == ["E88", "1.000, > 32", "1,234", "64", "3.0"]
    assert by_length == ["E88", "1.000", "0.998", "0.992", "0.001", "2"]
    summary, by_length = rows(text, "Gated DeltaNet in [0, 1]")
    assert summary[1] == "0.996, 8"
    assert by_length[1:4] == ["0.996", "0.985", "0.650 (0.600)"]
    summary, _ = rows(text, "transformer")
    assert summary[1] == "0.700, none"
    assert summary[3] == "512 and growing"
    assert "## 1 layer of dim 16, float32" in text
    assert "## 2 layers of dim 16, float32" in text
    assert rows(text, "unknown")
    assert text.startswith("cpu, JAX 1, commit abc; 6 runs of up to 2 seeds.")


def test_fewer_models_than_problems_are_columns() -> None:
    problems = "parity", "fsm", "copy"
    lines = [run("e88", 0, 1.0, 0.9, problem=x) for x in problems]
    lines += [run("lstm", 0, 0.6, 0.5, problem=x) for x in problems[:2]]
    header, _, *table = (
        line.strip("| ").split(" | ")
        for line in report.summaries(lines).splitlines()
        if line.startswith("|")
    )
    assert header == ["problem", "E88", "LSTM", "chance"]
    assert [row[0] for row in table] == [*problems, "parameters", "state", "s a run"]
    assert table[0] == ["parity", "1.000, 8", "0.600, none", "0.500"]
    assert table[2] == ["copy", "1.000, 8", "", "0.500"]


def lines_on_ranges(*problems: str) -> list[report.Record]:
    """Two seeds of two models on each problem, read on two ranges of lengths."""
    found = list[report.Record]()
    for seed, accuracy in enumerate(
        ({"3 to 8": 1.0, "8 to 32": 0.9}, {"3 to 8": 1.0, "8 to 32": 0.7})
    ):
        chance, state = {"3 to 8": 0.5, "8 to 32": 0.4}, dict.fromkeys(accuracy, 64)
        read = {"accuracy": accuracy, "chance": chance, "state": state}
        for model in ("e88", "lstm"):
            found += [run(model, seed, problem=problem) | read for problem in problems]
    return found


def test_readings_of_many_lengths_have_no_horizon() -> None:
    text = report.summaries(lines_on_ranges("parity", "arithmetic"))
    assert "accuracy on the first and the last reading" in text
    assert rows(text, "E88")[0][1:3] == ["1.000, 0.800 (0.700)"] * 2
    assert rows(text, "chance")[0][1:3] == ["0.500, 0.400"] * 2


def test_a_single_problem_of_many_readings_has_a_column_for_each() -> None:
    text = report.summaries(lines_on_ranges("mqar"))
    assert "accuracy on each reading" in text
    assert rows(text, "model")[0][1:3] == ["3 to 8", "8 to 32"]
    assert rows(text, "E88")[0][1:3] == ["1.000", "0.800 (0.700)"]
    assert rows(text, "chance")[0][1:3] == ["0.500", "0.400"]


def test_plots_have_a_point_for_each_length_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readings of many lengths are drawn at the greatest."""
    drawn = dict[str, list[int]]()
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        Axes, "set_xticks", lambda axes, ticks, labels, **_: drawn.update({labels[0]: ticks})
    )
    ranges = ["3 to 8", "8 to 32"]
    by_name = {name: dict.fromkeys(ranges, 0.5) for name in ("accuracy", "chance", "state")}
    lines = [run("e88", 0, 1.0, 0.9, 0.8, problem="fsm"), run("e88", 0) | by_name]
    (image,) = plot.write(tmp_path, lines, "Suite")
    assert image.name == "accuracy_16x1_float32.png"
    assert drawn == {"8": [8, 16, 32], "3 to 8": [8, 32]}


@pytest.mark.parametrize("suite", SUITES)
def test_colors_of_a_suite_are_told_apart(suite: str) -> None:
    colors = [to_rgb(plot.COLORS[model]) for model in SUITES[suite].models]
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors, 2)) > 0.25


def test_csv_has_a_row_for_each_run_and_reading() -> None:
    found = list(csv.DictReader(io.StringIO(report.to_csv(LINES))))
    assert len(found) == 6 * 3
    row = found[14]
    assert (row["model"], row["read_at"], row["state"]) == ("transformer", "32", "2048")
    assert (row["length"], row["batch_size"], row["accuracy"]) == ("8", "4", "0.5")


@pytest.mark.parametrize("n_problems", [1, 2, 3, 6])
def test_the_legend_of_all_models_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_problems: int
) -> None:
    widths = list[tuple[float, float]]()

    def savefig(figure: Figure, *_: Any, **__: Any) -> None:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        widths.append((legend.get_window_extent().width, figure.bbox.width))

    monkeypatch.setattr(Figure, "savefig", savefig)
    problems = [f"problem {i}" for i in range(n_problems)]
    lines = [run(model, 0, 1.0, 0.9, problem=x) for x in problems for model in controls.MODELS]
    plot.write(tmp_path, lines, "Suite")
    assert all(legend < figure for legend, figure in widths), widths
    assert widths
