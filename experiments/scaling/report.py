"""Results of a scaling run: CSV, JSON and PNG, a table, and the best n_state."""

import csv
import dataclasses
import datetime
import io
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure.timing import ClockSampler
from experiments.harness import run_directory

from . import published
from .measure import Measurement, Row, Setting
from .plot import plot_scaling

FILES = CSV, JSON, PNG = "results.csv", "results.json", "results.png"


def describe(setting: Setting, clock: ClockSampler) -> dict[str, Any]:
    """Device, versions, date and configuration, for JSON."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": clock.query("driver_version") if device.platform == "gpu" else None,
        "versions": run_directory.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(setting),
    }


def write(directory: Path, about: dict[str, Any], measured: list[Measurement]) -> None:
    """Writes the measurements so far into the three files."""
    rows = [measurement.row() for measurement in measured]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_directory.write(directory / CSV, text.getvalue().encode())
    everything = {
        **about,
        "published": {
            "device": published.DEVICE,
            "backward_over_forward": published.BACKWARD_OVER_FORWARD,
            "tokens_per_second": {n: x.text for n, x in published.TOKENS_PER_SECOND.items()},
        },
        "results": [measurement.to_dict() for measurement in measured],
    }
    run_directory.write(directory / JSON, json.dumps(everything, indent=2).encode() + b"\n")
    plot_scaling(rows, about, directory / PNG)


def sentence(row: Row) -> str:
    """One n_state in a sentence."""
    said = []
    if row["forward_ms"] is not None:
        said.append(f"forward {_number(row['forward_ms'])} ms")
    if row["backward_ms"] is not None:
        said.append(f"backward {_number(row['backward_ms'])} ms")
    if row["training_step_ms"] is not None:
        said.append(
            f"training step {_number(row['training_step_ms'])} ms, "
            f"{row['training_step_tokens_per_second']:,.0f} tokens/s"
        )
    if row["missing"] is not None:
        said.append(f"missing: {_shortened(row['missing'])}")
    return f"n_state {row['n_state']} x {row['n_heads']} heads: " + ", ".join(said)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


_COLUMNS = (
    ("", "n_state", "n_state"),
    ("", "heads", "n_heads"),
    ("", "d_inner", "d_inner"),
    ("forward", "ms", "forward_ms"),
    ("backward", "ms", "backward_ms"),
    ("backward/", "forward", "backward_over_forward"),
    ("forward", "ps/element", "forward_ps_per_element"),
    ("backward", "ps/element", "backward_ps_per_element"),
    ("recurrence", "tokens/s", "recurrence_tokens_per_second"),
    ("layer step", "ms", "training_step_ms"),
    ("layer step", "tokens/s", "training_step_tokens_per_second"),
)


def table(rows: list[Row]) -> str:
    """A line for each n_state, with what was published beside it."""
    lines = [[first for first, _, _ in _COLUMNS], [second for _, second, _ in _COLUMNS]]
    lines[0].append("published")
    lines[1].append(published.DEVICE)
    for row in rows:
        values = [row[key] for _, _, key in _COLUMNS]
        cells = ["-" if x is None else str(x) if isinstance(x, int) else _number(x) for x in values]
        throughput = published.TOKENS_PER_SECOND.get(row["n_state"])
        lines.append([*cells, "" if throughput is None else throughput.text])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def conclusions(rows: list[Row]) -> list[str]:
    """Which n_state is the cheapest by element of the state, and which has the most tokens/s."""
    said = []
    timed = [row for row in rows if row["both_ps_per_element"] is not None]
    if timed:
        best = min(timed, key=lambda row: row["both_ps_per_element"])
        said.append(
            f"lowest cost per state element: n_state {best['n_state']}, "
            f"{_number(best['both_ps_per_element'])} ps forward and backward"
        )
    for what, key in (
        ("recurrence", "recurrence_tokens_per_second"),
        ("training step of a layer", "training_step_tokens_per_second"),
    ):
        timed = [row for row in rows if row[key] is not None]
        if timed:
            best = max(timed, key=lambda row: row[key])
            said.append(f"most tokens/s, {what}: n_state {best['n_state']}, {best[key]:,.0f}")
    return said
