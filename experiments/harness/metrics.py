"""Metrics of a run: JSON lines, TensorBoard, a plot, and a clock of training steps."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from experiments.cli.errors import warn
from experiments.tasks.base import Metric

from .run_directory import optional, write

if TYPE_CHECKING:
    from .step import StepMetrics


Record = dict[str, Any]
"""A line of `metrics.jsonl`: "kind" ("train" or "validation"), "step", and numbers by name."""


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`.

    A last line cut short by a kill is left out; so is a line that is no record, with a warning.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if _is_record(last):
        lines.append(last)
    records = [json.loads(line) if _is_record(line) else None for line in lines]
    bad = [str(number) for number, record in enumerate(records, 1) if record is None]
    if bad:
        lines_are = f"lines {', '.join(bad)} are" if len(bad) > 1 else f"line {bad[0]} is"
        warn(f"{path}: {lines_are} not a record, and left out.")
    return [record for record in records if record is not None]


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and type(record.get("step")) is int
        and all(type(value) in (int, float) for name, value in record.items() if name != "kind")
    )


class MetricsLog:
    """Writes records to `metrics.jsonl`, a line each, and their numbers to TensorBoard.

    A line that cannot be written, as on a full disk, is tried again with the next; one warning
    says so.

    Args:
        directory: of the run.
        start: step that the run continues from; records of later steps, from a run killed after
            its last checkpoint, are dropped.

    Raises:
        UsageError: `metrics.jsonl` cannot be written at the start.
    """

    def __init__(self, directory: Path, *, start: int):
        self._path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= start]
        write(self._path, b"".join(_line(record) for record in kept))
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._failed = False
        self._tensorboard = None
        with optional(directory / "tensorboard"):
            self._tensorboard = _TensorBoard(directory / "tensorboard", kept)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Adds a record of `kind` ("train" or "validation"); others than finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record = {"kind": kind, "step": step, **finite}
        self._unwritten += _line(record)
        self._write_lines()
        if self._tensorboard is not None:
            with optional(self._tensorboard.directory):
                self._tensorboard.write(record)
                return
            self._tensorboard.close()
            self._tensorboard = None

    def _write_lines(self) -> None:
        try:
            while self._unwritten:  # a disk that fills up takes a part
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._failed:
                warn(f"{self._path} cannot be written ({error.strerror}); the run goes on.")
            self._failed = True

    def close(self) -> None:
        """Writes the lines that could not be written before, if possible now."""
        self._write_lines()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


class _TensorBoard:
    """An event file that holds each event when `write` returns, also if the process is killed.

    `tensorboard.summary.Writer` writes in a thread, which prints a traceback when the disk is full,
    and loses two minutes of a killed run.
    """

    def __init__(self, directory: Path, earlier: Iterable[Record]):
        """Starts with `earlier` records, and replaces the event files that were there."""
        self.directory = directory
        directory.mkdir(exist_ok=True)
        before = sorted(directory.glob("events.out.tfevents.*"))
        times = {
            event.step: event.wall_time
            for path in before
            for event in LegacyEventFileLoader(str(path)).Load()
        }
        # TensorBoard reads a directory's files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("xb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        for record in earlier:
            self.write(record, times.get(record["step"]))
        for path in before:
            path.unlink()

    def write(self, record: Record, wall_time: float | None = None) -> None:
        """Adds a point per number of the record, by default with the present time."""
        summary = Summary()
        for name, value in record.items():
            if name not in ("kind", "step"):
                summary.MergeFrom(scalar_pb(f"{record['kind']}/{name}", value))
        self._write(Event(wall_time=wall_time or time.time(), step=record["step"], summary=summary))

    def _write(self, event: Event) -> None:
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # flushing, after an event could not be written
            self._file.close()


class Interval:
    """Sums over the steps since the last record, also kept in checkpoints.

    Steps whose loss or gradient is not finite do not count.
    """

    def __init__(self, steps: int = 0, **sums: float):
        self._steps, self._sums = steps, sums

    def add(self, steps: "Iterable[StepMetrics]") -> None:
        """Adds steps in order, in float64: the sums do not depend on the number of calls."""
        for step in steps:
            if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
                self._steps += 1
                for name in ("loss", "grad_norm", "score"):
                    if (value := getattr(step, name)) is not None:
                        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def sums(self) -> dict[str, float]:
        """The arguments of an equal interval, for JSON."""
        return {"steps": self._steps, **self._sums}

    def means(self) -> dict[str, float]:
        """Mean loss, gradient norm and score, if there is one; empty if no step counted."""
        return {name: total / self._steps for name, total in self._sums.items()}


class TrainingClock:
    """Clock of training steps, without pauses for evaluation and checkpoints."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def plot_metric(directory: Path, metric: Metric) -> None:
    """Draws training and validation over steps from `metrics.jsonl` into `loss.png`.

    A failure, such as a full disk, is a warning.
    """
    image = directory / "loss.png"
    partial = image.with_name(image.name + ".partial")
    try:
        _draw(read_metrics(directory / "metrics.jsonl"), metric, partial)
        partial.replace(image)
    except Exception as error:  # also matplotlib's
        with contextlib.suppress(OSError):
            partial.unlink()
        warn(f"{image} is not drawn: {error}.")


def _draw(records: list[Record], metric: Metric, image: Path) -> None:
    from matplotlib.figure import Figure  # an OSError without a directory for its cache

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=metric.unit)
    for kind, marker in (("train", ""), ("validation", "o")):
        # A record has no metric if none of its steps had a finite loss.
        points = [
            (record["step"], record[metric.name])
            for record in records
            if record["kind"] == kind and metric.name in record
        ]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], label=kind, marker=marker)
        if points and kind == "validation":
            step, best = min(points, key=lambda point: metric.rank(point[1]))
            axes.annotate(
                f"best {best:.3f} at step {step}",
                (step, best),
                textcoords="offset points",
                xytext=(0, 18),
                ha="right",
            )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(image, dpi=120, format="png")
