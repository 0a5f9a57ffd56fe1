"""A suite while it runs: what is left of it, and how a device does that."""

import dataclasses
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from e88_jax.mixers.base import Execution
from e88_jax.sizing.compare import state_after
from experiments.harness import run_directory
from experiments.tasks.synthetic.reading import Reader, Reading

from . import controls
from .controls import Size
from .records import Cell, Record, Records
from .suites import SEARCH_SEED, Dtype, Problem, Suite
from .training import Trained, Training
from .trial import Lane, Trial

SAVED_STATE_INTERVAL = 8
"""E88's interval of saved states; the GPU's kernels have their own."""


def cells(suite: Suite) -> Iterator[tuple[Cell, Size, Dtype]]:
    """The combinations of a suite; a hybrid of one layer is none."""
    combinations = itertools.product(suite.problems, suite.sizes, suite.models, suite.dtypes)
    for problem, size, model, dtype in combinations:
        if model != "hybrid" or size.depth > 1:
            yield Cell(problem, size.dim, size.depth, model, dtype), size, dtype


@dataclasses.dataclass(frozen=True)
class Work:
    """Trainings that run together: of a cell's seeds, or of the rates that are searched for it."""

    cell: Cell
    kind: str
    """"run" or "search"."""
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """Rates to search; empty for a run."""
    trial: Trial
    protocol: Record
    """How the cell's models are trained, for its lines."""
    readings: tuple[Reading, ...]

    @property
    def lanes(self) -> int:
        """Trainings."""
        return max(len(self.seeds), len(self.rates))

    @property
    def lane_steps(self) -> int:
        """Steps of all of them."""
        return self.trial.steps * self.lanes


def left(suite: Suite, records: Records) -> list[Work]:
    """The work that the records lack, in the order in which it is done.

    Raises:
        UsageError: the records of a cell are of another protocol.
    """
    found: list[Work] = []
    for cell, size, dtype in cells(suite):
        how = protocol(suite, suite.problems[cell.problem], size)
        records.require_protocol(cell, how)
        done = records.seeds(cell)
        seeds = tuple(seed for seed in suite.seeds if seed not in done)
        if not seeds:
            continue
        problem = suite.problems[cell.problem]
        execution = Execution(dtype=dtype, saved_state_interval=SAVED_STATE_INTERVAL)
        model = controls.build(
            cell.model,
            size,
            problem.task.vocab_size,
            execution,
            embedding_std=suite.embedding_std,
        )
        assert model is not None, "cells leave out what cannot be built"
        trial = Trial(
            task=problem.task,
            model=model,
            optimizer=suite.optimizer,
            length=problem.length,
            batch_size=suite.batch_size,
            steps=problem.steps,
            stop_at=suite.stop_at,
        )
        if len(suite.rates) > 1 and not records.search(cell).keys() >= set(suite.rates):
            steps = math.ceil(suite.search_steps * problem.steps)
            search = dataclasses.replace(trial, steps=steps, stop_at=None)
            found.append(Work(cell, "search", (SEARCH_SEED,), suite.rates, search, how, ()))
        found.append(Work(cell, "run", seeds, (), trial, how, problem.readings))
    return found


def protocol(suite: Suite, problem: Problem, size: Size) -> Record:
    """How a suite trains models of a size on a problem, and reads them."""
    optimizer = dataclasses.asdict(suite.optimizer)
    del optimizer["learning_rate"], optimizer["max_skipped_steps"]  # a lane's own; not used
    return {
        "task": repr(problem.task),
        "readings": [name(reading) for reading in problem.readings],
        "read_rows": suite.read_batches * suite.read_batch_size,
        "heads": [size.n_heads, size.n_state, size.conv_size],
        "length": problem.length,
        "steps": problem.steps,
        "batch_size": suite.batch_size,
        "rates": list(suite.rates),
        "search_steps": suite.search_steps,
        "stop_at": suite.stop_at,
        "embedding_std": suite.embedding_std,
        **optimizer,
    }


class Runner:
    """Does work on a device, and adds its lines to the records; compiles what comes next while one
    runs."""

    def __init__(self, suite: Suite, records: Records, device: Any):
        self._suite, self._records, self._device = suite, records, device
        self._compilers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._compiling: dict[int, Future[tuple[Training, Reader]]] = {}

    def close(self) -> None:
        """Waits for what is being compiled."""
        self._compilers.shutdown(cancel_futures=True)

    def prepare(self, work: Work) -> None:
        """Begins to compile."""
        self._compiling[id(work)] = self._compilers.submit(self._compile, work)

    def _compile(self, work: Work) -> tuple[Training, Reader]:
        with jax.default_device(self._device):
            training = Training(work.trial, work.lanes)
            reader = Reader(
                training.graphdef,
                training.params,
                work.readings,
                window=work.trial.length,
                batches=self._suite.read_batches,
                batch_size=self._suite.read_batch_size,
            )
        return training, reader

    def run(self, work: Work, advanced: Callable[[int], None]) -> None:
        """Does work that was prepared.

        Args:
            work: to do.
            advanced: called with the steps of all its trainings that are done.
        """
        training, reader = self._compiling.pop(id(work)).result()
        lanes = self._lanes(work)
        with jax.default_device(self._device):
            trained = training(lanes, lambda steps: advanced(steps * len(lanes)))
            measured = self._read(work, trained, reader)
        about = self._about(work)
        self._records.add(
            about | {"kind": work.kind} | _of_lane(trained, i, lane) | measured(i)
            for i, lane in enumerate(lanes)
        )

    def _lanes(self, work: Work) -> list[Lane]:
        if work.kind == "search":
            return [Lane(seed=SEARCH_SEED, learning_rate=rate) for rate in work.rates]
        rates = self._suite.rates
        rate = rates[0] if len(rates) == 1 else best_rate(self._records.search(work.cell))
        return [Lane(seed=seed, learning_rate=rate) for seed in work.seeds]

    def _read(self, work: Work, trained: Trained, reader: Reader) -> Callable[[int], Record]:
        """From a lane to what is read."""
        if not work.readings:
            return lambda _: {}
        rows, began = self._suite.read_batch_size, time.perf_counter()
        read = dict(zip(map(name, work.readings), reader(trained.params), strict=True))
        chance = {name(x): round(x.task.chance(x.length, rows), 4) for x in work.readings}
        seconds = round(time.perf_counter() - began, 1)
        return lambda lane: {
            "accuracy": {label: round(float(values[lane]), 5) for label, values in read.items()},
            "chance": chance,
            "reading_seconds": seconds,
        }

    def _about(self, work: Work) -> Record:
        model = work.trial.model
        state = {name(x): state_after(model, x.length) for x in work.readings}
        return work.cell._asdict() | {
            "protocol": work.protocol,
            "parameters": model.count_params(),
            "state": state,
            **provenance(),
        }


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


def _of_lane(trained: Trained, lane: int, what: Lane) -> Record:
    return {
        **dataclasses.asdict(what),
        "steps": trained.steps[-1],
        # Means over equal parts of the steps.
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
    problems: Sequence[str] = (),
    models: Sequence[str] = (),
    dtypes: Sequence[Dtype] = (),
    depths: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> Suite:
    """The suite with some of its problems, models, precisions, depths or seeds; none for all.

    Raises:
        ValueError: there is no such problem, model or depth.
    """
    for problem in problems:
        if problem not in suite.problems:
            there_are = ", ".join(map(repr, suite.problems))
            raise ValueError(f"there is no problem {problem!r} in the suite: {there_are}.")
    for model in models:
        if model not in controls.MODELS:
            raise ValueError(f"there is no model {model!r}: {', '.join(controls.MODELS)}.")
    there = sorted({size.depth for size in suite.sizes})
    if wrong := sorted(set(depths) - set(there)):
        raise ValueError(f"--depths are {there} in the suite, got {wrong}.")
    chosen: dict[str, Problem] = {x: suite.problems[x] for x in problems or suite.problems}
    return dataclasses.replace(
        suite,
        problems=chosen,
        models=tuple(models or suite.models),
        dtypes=tuple(dtypes or suite.dtypes),
        sizes=tuple(size for size in suite.sizes if not depths or size.depth in depths),
        seeds=tuple(seeds or suite.seeds),
    )
