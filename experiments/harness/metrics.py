"""Where a run's numbers go: JSON lines, TensorBoard, and a clock that counts training alone."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class MetricsLog:
    """Writes records to `metrics.jsonl`, a line each, and their numbers to TensorBoard.

    Args:
        directory: of the run.
        start: step that the run continues from; records of later steps, which a killed run had
            written past its last checkpoint, are dropped.
    """

    def __init__(self, directory: Path, *, start: int):
        path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = Writer(str(directory / "tensorboard"))

    def write(self, kind: str, step: int, **values: float) -> None:
        """Adds a record of `kind` ("train" or "validation"); what is not finite is left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._tensorboard.close()


class TrainingClock:
    """Seconds spent in training steps: pauses for evaluation and checkpoints do not count."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
