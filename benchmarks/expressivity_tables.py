"""The tables of docs/expressivity.md: suites of trials."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.trials import report
from experiments.trials.records import Record
from experiments.trials.suites import SUITES, in_order

RESULTS = "experiments/results/expressivity"
RECORDED = "quick", "author", "groups", "formal", "recall", "ablations"
"""Suites whose results are recorded."""


def suite(root: Path, name: str) -> str:
    """Accuracy and horizon of every model on every problem."""
    directory = f"{RESULTS}/{name}"
    text = (root / directory / "runs.jsonl").read_text()
    lines = in_order(name, map(json.loads, text.splitlines()))
    command = f"python experiments/expressivity.py {name} --out {directory}"
    by_dtype = {line["dtype"]: [x for x in lines if x["dtype"] == line["dtype"]] for line in lines}
    commands = "\n".join(f"    {command}{_flags(name, mine)}" for mine in by_dtype.values())
    return f"{report.sources(lines)}:\n\n{commands}\n\n{report.summaries(lines)}"


def _flags(name: str, lines: Sequence[Record]) -> str:
    """The flags for these runs of one precision, where they are not the suite's."""
    suite = SUITES[name]
    ours = {"dtypes": suite.dtypes, "models": suite.models, "problems": suite.problems}
    flags = ""
    for plural, all_of_suite in ours.items():
        values = list(dict.fromkeys(line[plural[:-1]] for line in lines))
        if set(values) != set(all_of_suite):
            flags += f" --{plural} {' '.join(map(shlex.quote, values))}"
    return flags
