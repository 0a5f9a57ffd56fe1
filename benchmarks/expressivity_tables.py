"""The tables of docs/expressivity.md: suites of trials."""

import json
from pathlib import Path

from experiments.trials import report
from experiments.trials.suites import SUITES, in_order

RESULTS = "experiments/results/expressivity"
RECORDED = "quick", "author", "groups", "formal"
"""Suites whose results are recorded."""


def suite(root: Path, name: str) -> str:
    """Accuracy and horizon of every model on every problem."""
    directory = f"{RESULTS}/{name}"
    text = (root / directory / "runs.jsonl").read_text()
    lines = in_order(name, map(json.loads, text.splitlines()))
    command = f"python experiments/expressivity.py {name} --out {directory}"
    models = list(dict.fromkeys(line["model"] for line in lines))
    if set(models) != set(SUITES[name].models):
        command += f" --models {' '.join(models)}"
    return f"{report.sources(lines)}:\n\n    {command}\n\n{report.summaries(lines)}"
