"""Tables of a suite's results: Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import run_directory
from experiments.markdown import table

from .controls import title
from .records import Cell, Group, Record, by_heading

MARKDOWN, CSV = "report.md", "runs.csv"

EXPLANATION = (
    "Accuracies are means of the seeds, with the lowest in brackets where it is lower by 0.01 or "
    "more; the first reading is at the training length, but for recall. The horizon is the "
    "greatest length up to which every seed has 0.99; '>' marks one that is the greatest length "
    "read. Problems that are not read at single lengths have the last reading in its place."
)


def write(directory: Path, lines: Sequence[Record], heading: str, about: str) -> None:
    """Writes the tables of the lines into a suite's directory."""
    text = f"# {heading}\n\n{about[0].upper()}{about[1:]}.\n\n{markdown(lines)}\n"
    run_directory.write(directory / MARKDOWN, text.encode())
    run_directory.write(directory / CSV, to_csv(lines).encode())


def markdown(lines: Sequence[Record]) -> str:
    """For each size and precision: accuracy on the first reading, horizons, and by length."""
    parts = [f"{sources(lines)}. {EXPLANATION}"]
    for heading, mine in by_heading(lines).items():
        contents = _contents(mine)
        parts += [f"## {heading}", f"{contents[0].upper()}{contents[1:]}:", _summary(mine)]
        parts += [_by_length(problem, mine) for problem in _in_order(c.problem for c in mine)]
    return "\n\n".join(parts)


def summaries(lines: Sequence[Record]) -> str:
    """For each size and precision: accuracy on the first reading, and horizons."""
    return "\n\n".join(
        f"{heading}, {_contents(mine)}:\n\n{_summary(mine)}"
        for heading, mine in by_heading(lines).items()
    )


def sources(lines: Iterable[Record]) -> str:
    """Devices, versions, commits and seeds of the runs."""
    runs = [x for x in lines if x["kind"] == "run"]

    def every(name: str) -> str:
        return ", ".join(str(x) for x in _in_order(run[name] for run in runs))

    seeds = len(_in_order(run["seed"] for run in runs))
    return (
        f"{every('device')}, JAX {every('jax')}, commit {every('commit')}; {len(runs)} runs of up "
        f"to {seeds} seeds"
    )


def _contents(found: dict[Cell, Group]) -> str:
    """The caption of a summary: what its cells hold."""
    if any(group.lengths for group in found.values()):
        return "accuracy on the first reading and horizon"
    if len({cell.problem for cell in found}) == 1:
        return "accuracy on each reading"
    return "accuracy on the first and the last reading"


def _summary(found: dict[Cell, Group]) -> str:
    """Accuracy and horizon of each problem, or accuracy on each reading of a single problem that is
    not read at single lengths, parameters, state and seconds of each model: a row for each model,
    or a column if there are fewer models than problems."""
    problems = _in_order(cell.problem for cell in found)
    columns: list[tuple[str, str | None]] = [(problem, None) for problem in problems]
    first = next(iter(found.values()))
    if len(problems) == 1 and not first.lengths:
        columns = [(problems[0], reading) for reading in first.readings]
    header = [reading or problem for problem, reading in columns]
    rows: list[list[str]] = []
    for model in _in_order(cell.model for cell in found):
        mine = {c.problem: g for c, g in found.items() if c.model == model}
        runs = [run for group in mine.values() for run in group.runs]
        seconds = [run["seconds"] / run["lanes"] for run in runs]
        cells = [_cell(mine.get(problem), reading) for problem, reading in columns]
        counts = f"{max(run['parameters'] for run in runs):,}", _state(runs)
        rows.append([title(model), *cells, *counts, f"{sum(seconds) / len(seconds):,.1f}"])
    of_problem = {cell.problem: group for cell, group in found.items()}
    chances = [_chance(of_problem[problem], reading) for problem, reading in columns]
    rows.append(["chance", *chances, "", "", ""])
    header = ["model", *header, "parameters", "state", "s a run"]
    if len(rows) <= len(problems):
        header, *rows = map(list, zip(header, *rows, strict=True))
        header[0] = "problem"
    return table(header, rows)


def _cell(group: Group | None, reading: str | None) -> str:
    """The accuracy on a reading, or on the first one and what `_at_length` says."""
    if group is None:
        return ""
    return accuracy(group, reading) if reading else f"{accuracy(group)}, {_at_length(group)}"


def _chance(group: Group, reading: str | None) -> str:
    """The chance levels of what `_cell` has accuracies of."""
    if reading is None:
        readings = group.readings[:1] if group.lengths else [group.readings[0], group.readings[-1]]
    else:
        readings = [reading]
    return ", ".join(f"{group.runs[0]['chance'][x]:.3f}" for x in readings)


def _by_length(problem: str, found: dict[Cell, Group]) -> str:
    mine = {c.model: g for c, g in found.items() if c.problem == problem}
    first = next(iter(mine.values()))
    length = first.runs[0]["protocol"]["length"]
    header = ["model", *first.readings, "rate", "seeds"]
    rows = [
        [
            title(model),
            *(accuracy(group, reading) for reading in first.readings),
            f"{group.runs[0]['learning_rate']:g}",
            str(len(group.runs)),
        ]
        for model, group in mine.items()
    ]
    chance = first.runs[0]["chance"]
    rows.append(["chance", *(f"{chance[x]:.3f}" for x in first.readings), "", ""])
    return f"**{problem}**, trained at {length}, read at:\n\n{table(header, rows)}"


def accuracy(group: Group, reading: str | None = None) -> str:
    """The mean of the seeds, by default on the first reading, and the lowest where it differs."""
    values = group.values(reading or group.readings[0])
    mean, low = sum(values) / len(values), min(values)
    return f"{mean:.3f}" if mean - low < 0.01 else f"{mean:.3f} ({low:.3f})"


def _at_length(group: Group) -> str:
    """The horizon, else the accuracy on the last reading."""
    if not group.lengths:
        return accuracy(group, group.readings[-1])
    horizon = group.horizon()
    if horizon is None:
        return "none"
    return f"> {horizon}" if horizon == group.lengths[-1] else str(horizon)


def _state(runs: Sequence[Record]) -> str:
    """The most elements of state, after the sequences of the first reading."""
    first, last = (max(list(run["state"].values())[i] for run in runs) for i in (0, -1))
    return f"{first:,}" if first == last else f"{first:,} and growing"


def to_csv(lines: Iterable[Record]) -> str:
    """A row for each run and reading."""
    fields = ["problem", "model", "dim", "depth", "dtype", "seed", "learning_rate", "steps"]
    fields += ["parameters", "seconds", "lanes", "device"]
    of_protocol = ["length", "batch_size"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fields, *of_protocol, "read_at", "state", "accuracy", "chance"])
    for run in lines:
        if run["kind"] == "run":
            for reading, value in run["accuracy"].items():
                row: list[Any] = [run[name] for name in fields]
                row += [run["protocol"][name] for name in of_protocol]
                row += [reading, run["state"][reading], value, run["chance"][reading]]
                writer.writerow(row)
    return text.getvalue()


def _in_order(values: Iterable[Any]) -> list[Any]:
    """The values, each once, in the order of their first."""
    return list(dict.fromkeys(values))
