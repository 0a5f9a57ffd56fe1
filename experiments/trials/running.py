"""A suite while it runs: one cell after the other, done ones skipped."""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from e88_jax.mixers.base import Execution
from experiments.harness import run_directory

from . import controls
from .controls import Size
from .reading import accuracy
from .records import Cell, Record, Records
from .suites import SEARCH_SEED, Problem, Suite
from .training import Trained, train
from .trial import Lane, Reading, Trial

SAVED_STATE_INTERVAL = 8
"""E88's interval of saved states, where the GPU's kernels round it up to 32."""


def cells(suite: Suite) -> Iterator[tuple[Cell, Size]]:
    """The combinations of a suite; a hybrid of one layer is none."""
    for name in suite.problems:
        for size in suite.sizes:
            for model in suite.models:
                for dtype in suite.dtypes:
                    if model != "hybrid" or size.depth > 1:
                        yield Cell(name, size.dim, size.depth, model, dtype), size


@dataclasses.dataclass(frozen=True)
class Work:
    """What is left of a cell."""

    cell: Cell
    size: Size
    seeds: tuple[int, ...]
    """Seeds without a run."""
    search: tuple[float, ...]
    """Rates to search; empty if the rate is known."""
    steps: int
    """Steps of a run."""
    search_steps: int

    @property
    def lane_steps(self) -> int:
        """Steps of all trainings."""
        return self.steps * len(self.seeds) + self.search_steps * len(self.search)


def left(suite: Suite, records: Records) -> list[Work]:
    """The work that the records lack."""
    found: list[Work] = []
    for cell, size in cells(suite):
        seeds = tuple(seed for seed in suite.seeds if seed not in records.seeds(cell))
        if not seeds:
            continue
        steps = suite.problems[cell.problem].steps
        searched = len(suite.rates) == 1 or records.search(cell).keys() >= set(suite.rates)
        rates = () if searched else suite.rates
        search_steps = math.ceil(suite.search_steps * steps)
        found.append(Work(cell, size, seeds, rates, steps, search_steps))
    return found


def run(suite: Suite, work: Work, records: Records, advanced: Callable[[int], None]) -> None:
    """Does the work of one cell, and adds its lines.

    Args:
        suite: of the cell.
        work: to do.
        records: where the lines go.
        advanced: called with the steps of all trainings that are done.
    """
    problem = suite.problems[work.cell.problem]
    execution = Execution(dtype=work.cell.dtype, saved_state_interval=SAVED_STATE_INTERVAL)  # pyright: ignore
    model = controls.build(work.cell.model, work.size, problem.task.vocab_size, execution)
    assert model is not None, "cells leave out what cannot be built"
    trial = Trial(
        task=problem.task,
        model=model,
        optimizer=suite.optimizer,
        length=problem.length,
        batch_size=suite.batch_size,
        steps=work.steps,
        stop_at=suite.stop_at,
    )
    about = work.cell._asdict() | {
        "length": problem.length,
        "batch_size": suite.batch_size,
        "parameters": model.count_params(),
        "state_size": model.state_size(),
        **provenance(),
    }
    before = 0
    if work.search:
        search = dataclasses.replace(trial, steps=work.search_steps)
        lanes = [Lane(seed=SEARCH_SEED, learning_rate=rate) for rate in work.search]
        trained = train(search, lanes, lambda steps, _: advanced(steps * len(lanes)))
        records.add(about | _of_lane(trained, i, lane, "search") for i, lane in enumerate(lanes))
        before = work.search_steps * len(lanes)
    rate = suite.rates[0] if len(suite.rates) == 1 else best_rate(records.search(work.cell))
    lanes = [Lane(seed=seed, learning_rate=rate) for seed in work.seeds]
    trained = train(trial, lanes, lambda steps, _: advanced(before + steps * len(lanes)))
    began = time.perf_counter()
    read = {
        name(reading): accuracy(
            trained.graphdef,
            trained.params,
            reading,
            window=problem.length,
            batches=suite.read_batches,
            batch_size=suite.read_batch_size,
        )
        for reading in problem.readings
    }
    chance = {name(x): round(x.task.chance(x.length), 4) for x in problem.readings}
    reading_seconds = round(time.perf_counter() - began, 1)
    records.add(
        about
        | _of_lane(trained, i, lane, "run")
        | {
            "accuracy": {label: round(float(values[i]), 5) for label, values in read.items()},
            "chance": chance,
            "reading_seconds": reading_seconds,
        }
        for i, lane in enumerate(lanes)
    )


def name(reading: Reading) -> str:
    """A reading's length, with what else it varies."""
    low = getattr(reading.task, "min_length", None)
    pairs = getattr(reading.task, "pairs", None)
    if low is not None:
        return f"{low} to {reading.length}"
    if isinstance(pairs, tuple):
        return f"{reading.length}, {pairs[0]} pairs"
    return str(reading.length)


def best_rate(search: dict[float, Record]) -> float:
    """The rate of the highest accuracy, of equal ones that of the lowest loss."""

    def rank(record: Record) -> tuple[float, float]:
        loss = record["training_loss"][-1]
        return record["training_accuracy"][-1], -loss if math.isfinite(loss) else -math.inf

    return max(search.values(), key=rank)["learning_rate"]


def _of_lane(trained: Trained, lane: int, what: Lane, kind: str) -> Record:
    return {
        "kind": kind,
        **dataclasses.asdict(what),
        "steps": trained.steps[-1],
        "training_steps": trained.steps,
        "training_accuracy": [round(float(x), 4) for x in trained.accuracy[lane]],
        "training_loss": [round(float(x), 4) for x in trained.loss[lane]],
        "seconds": round(trained.seconds, 2),
        "lanes": len(trained.accuracy),
        "compile_seconds": round(trained.compile_seconds, 1),
    }


def provenance() -> dict[str, Any]:
    """Device, version of JAX, commit and date."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": run_directory.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def selected(
    suite: Suite,
    *,
    problems: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    depths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Suite:
    """The suite with some of its problems, models, precisions, depths or seeds.

    Raises:
        ValueError: there is no such problem, model or depth.
    """
    problems, depths = problems or tuple(suite.problems), depths or ()
    for problem in problems:
        if problem not in suite.problems:
            there_are = ", ".join(map(repr, suite.problems))
            raise ValueError(f"there is no problem {problem!r} in the suite: {there_are}.")
    for model in models or ():
        if model not in controls.CONTROLS:
            raise ValueError(f"there is no model {model!r}: {', '.join(controls.CONTROLS)}.")
    there = {size.depth for size in suite.sizes}
    if wrong := set(depths) - there:
        raise ValueError(f"the suite's depths are {sorted(there)}, got {sorted(wrong)}.")
    chosen: dict[str, Problem] = {x: suite.problems[x] for x in problems}
    return dataclasses.replace(
        suite,
        problems=chosen,
        models=tuple(models or suite.models),
        dtypes=tuple(dtypes or suite.dtypes),
        sizes=tuple(size for size in suite.sizes if not depths or size.depth in depths),
        seeds=tuple(seeds or suite.seeds),
    )
