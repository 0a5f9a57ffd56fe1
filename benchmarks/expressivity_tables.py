"""The tables of docs/expressivity.md: suites of trials."""

import json
from pathlib import Path

from experiments.trials import report
from experiments.trials.suites import in_order

RESULTS = "experiments/results/expressivity"
SUITES = "quick", "author"
"""Suites whose results are recorded."""


def suite(root: Path, name: str) -> str:
    """Accuracy and horizon of every model on every problem."""
    directory = f"{RESULTS}/{name}"
    text = (root / directory / "runs.jsonl").read_text()
    lines = in_order(name, map(json.loads, text.splitlines()))
    command = f"python experiments/expressivity.py {name} --out {directory}"
    return f"{report.sources(lines)}:\n\n    {command}\n\n{report.summaries(lines)}"
