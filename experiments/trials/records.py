"""Results of trials: a file of JSON lines, to which each run adds one."""

import dataclasses
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli.errors import UsageError, warn

Record = dict[str, Any]
"""A line: "kind" ("run" or "search"), the cell's fields, and what was measured."""

RUNS = "runs.jsonl"
"""Name of the file in a suite's directory."""


class Cell(NamedTuple):
    """One combination of a suite; its runs differ by seed."""

    problem: str
    dim: int
    depth: int
    model: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.problem}, {self.model}, {self.dim} x {self.depth}, {self.dtype}"

    @property
    def heading(self) -> str:
        """Size and precision of the model, in words."""
        layers = "layer" if self.depth == 1 else "layers"
        return f"{self.depth} {layers} of dim {self.dim}, {self.dtype}"


def cell_of(record: Record) -> Cell:
    """The cell of a line."""
    return Cell(*(record[name] for name in Cell._fields))


class Records:
    """The lines of a file, which may not exist yet.

    Raises:
        UsageError: the file cannot be read, or a line is no record.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            text = b""
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
        whole, _, cut = text.rpartition(b"\n")
        if cut:  # by a kill
            warn(f"{path}: the last line is cut short, and left out.")
        self._whole_size = len(whole) + (b"\n" in text)
        self.lines = [self._parse(i, x) for i, x in enumerate(whole.splitlines(), 1) if x]

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
            cell_of(record)
            return record | {"kind": str(record["kind"]), "protocol": dict(record["protocol"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"line {number} of {self.path} is no record of a trial.") from None

    def add(self, records: Iterable[Record]) -> None:
        """Adds lines, and writes them through to the disk; threads may do so at the same time.

        Raises:
            UsageError: they cannot be written.
        """
        added = list(records)
        with self._lock:
            self._append(added)

    def _append(self, added: list[Record]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in added).encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "xb") as file:
                file.truncate(self._whole_size)
                file.seek(self._whole_size)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}.") from None
        self._whole_size += len(text)
        self.lines += added

    def require_protocol(self, cell: Cell, protocol: Record) -> None:
        """Raises:
        UsageError: a line of the cell is of a training by another protocol.
        """
        for there in (line["protocol"] for line in self.lines if cell_of(line) == cell):
            for name in sorted(there.keys() | protocol.keys()):
                before, now = (x.get(name, "unknown") for x in (there, protocol))
                if before != now:
                    raise UsageError(
                        f"{self.path} has runs of {cell} with {name} {before}, not {now}: --out "
                        "names another directory."
                    )

    def seeds(self, cell: Cell) -> set[int]:
        """Seeds whose runs are done."""
        return {x["seed"] for x in self.lines if x["kind"] == "run" and cell_of(x) == cell}

    def search(self, cell: Cell) -> dict[float, Record]:
        """The lines of the search of a learning rate, by rate."""
        found = (x for x in self.lines if x["kind"] == "search" and cell_of(x) == cell)
        return {x["learning_rate"]: x for x in found}


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one cell."""

    cell: Cell
    runs: list[Record]

    def values(self, reading: str) -> list[float]:
        """The runs' accuracies on a reading."""
        return [run["accuracy"][reading] for run in self.runs]

    @property
    def readings(self) -> list[str]:
        return list(self.runs[0]["accuracy"])

    @property
    def lengths(self) -> list[int]:
        """The readings that are of one length and vary nothing else."""
        return [int(reading) for reading in self.readings if reading.isdecimal()]

    def horizon(self, solved: float = 0.99) -> int | None:
        """The greatest length up to which every seed has `solved` of the answers; None if it is
        not the shortest one."""
        longest = None
        for length in self.lengths:
            if min(self.values(str(length))) < solved:
                break
            longest = length
        return longest


def groups(lines: Iterable[Record]) -> dict[Cell, Group]:
    """The runs by cell, in the order of the lines."""
    found: dict[Cell, Group] = {}
    for record in lines:
        if record["kind"] == "run":
            cell = cell_of(record)
            found.setdefault(cell, Group(cell, [])).runs.append(record)
    return found


def by_heading(lines: Iterable[Record]) -> dict[str, dict[Cell, Group]]:
    """The runs by size and precision of their models, then by cell."""
    found: dict[str, dict[Cell, Group]] = {}
    for cell, group in groups(lines).items():
        found.setdefault(cell.heading, {})[cell] = group
    return found
