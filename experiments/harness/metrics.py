"""Where a run's numbers go: JSON lines, TensorBoard, and a clock that counts training alone."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from .errors import warn
from .run_directory import optional, write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`.

    A last line cut short, as a killed process leaves it, is left out; so is a line that is no
    record, with a warning.
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

    A line that cannot be written, as the disk is full, is tried again with the next; a warning says
    so once.

    Args:
        directory: of the run.
        start: step that the run continues from; records of later steps, which a killed run had
            written past its last checkpoint, are dropped.

    Raises:
        UsageError: `metrics.jsonl` cannot be written to begin with.
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
        """Adds a record of `kind` ("train" or "validation"); what is not finite is left out."""
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
        """Writes what could not be written before, if it can be now."""
        self._write_lines()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


class _TensorBoard:
    """An event file: each event is in it when `write` returns, whatever becomes of the process.

    `tensorboard.summary.Writer` would write it in a thread, which prints a traceback when the disk
    is full, and loses two minutes of a killed run.
    """

    def __init__(self, directory: Path, earlier: Iterable[dict[str, Any]]):
        """Holds `earlier` records, and in place of the event files that were there before."""
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

    def write(self, record: dict[str, Any], wall_time: float | None = None) -> None:
        """Adds a point of each of the record's numbers, by default with the present time."""
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


class StepLoss(Protocol):
    """Numbers of one step; see `step.StepMetrics`."""

    @property
    def loss(self) -> Any: ...
    @property
    def grad_norm(self) -> Any: ...


class Interval:
    """Sums over the steps since the last record, which a checkpoint keeps for the next one.

    Steps whose loss or gradient was not finite do not count.
    """

    def __init__(self, steps: int = 0, loss: float = 0.0, grad_norm: float = 0.0):
        self._steps, self._loss, self._grad_norm = steps, loss, grad_norm

    def add(self, steps: Iterable[StepLoss]) -> None:
        """Adds steps in their order, as float64, so that it does not matter in how many calls."""
        for step in steps:
            loss, grad_norm = float(step.loss), float(step.grad_norm)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._steps += 1
                self._loss += loss
                self._grad_norm += grad_norm

    def sums(self) -> dict[str, Any]:
        """The arguments that make this interval again, for JSON."""
        return {"steps": self._steps, "loss": self._loss, "grad_norm": self._grad_norm}

    def means(self) -> dict[str, float]:
        """Mean loss in nats per byte and mean gradient norm; empty if no step counted."""
        if not self._steps:
            return {}
        return {"loss": self._loss / self._steps, "grad_norm": self._grad_norm / self._steps}


class TrainingClock:
    """Seconds spent in training steps: pauses for evaluation and checkpoints do not count."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
