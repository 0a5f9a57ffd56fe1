"""The suites of `expressivity.py`, as data: problems, sizes, models, protocol."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from experiments.harness.config import OptimizerConfig
from experiments.tasks.synthetic import (
    Arithmetic,
    Copy,
    Counter,
    Dyck,
    Group,
    KeyedRing,
    MultiQuery,
    Overwrite,
    Parity,
    Recall,
    Ring,
    SyntheticConfig,
)
from experiments.tasks.synthetic.reading import Reading, lengths_from

from .controls import CONTROLS, MODELS, VARIANTS, Size
from .records import Record, cell_of

Dtype = Literal["bfloat16", "float32"]

LONGEST = 4096
"""Greatest length that trained models are read at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task at a training length, and what the trained models are read on."""

    task: SyntheticConfig
    length: int
    """Tokens of a training sequence."""
    steps: int
    readings: tuple[Reading, ...]

    @classmethod
    def at(
        cls, task: SyntheticConfig, length: int, steps: int, longest: int = LONGEST
    ) -> "Problem":
        """Read at the training length and its multiples by powers of two, up to `longest`."""
        readings = (Reading(task=task, length=n) for n in lengths_from(length, longest))
        return cls(task=task, length=length, steps=steps, readings=tuple(readings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Problems, sizes, models and precisions, all of which are combined, and a protocol."""

    about: str
    """Its purpose, in a phrase."""
    problems: dict[str, Problem]
    sizes: tuple[Size, ...]
    models: tuple[str, ...]
    """Names in `MODELS`."""
    dtypes: tuple[Dtype, ...]
    seeds: tuple[int, ...]
    optimizer: OptimizerConfig
    batch_size: int
    rates: tuple[float, ...]
    """Learning rates. Of several, each model has the best on each problem: that of the highest
    accuracy after `search_steps` with a seed of its own."""
    search_steps: float = 0.5
    """Steps of the search, as a share of the problem's."""
    stop_at: float | None = None
    """As `Trial.stop_at`."""
    embedding_std: float = 1.0
    """Standard deviation of the initial embeddings."""
    read_batches: int = 16
    read_batch_size: int = 32


SEARCH_SEED = 1000
"""Seed of trainings that choose a rate."""

RATES = (3e-4, 1e-3, 3e-3, 1e-2)

# --- author ---------------------------------------------------------------------------------------

_AUTHOR = {
    "parity": Problem.at(Parity(), 128, 10_000),
    "counter 5": Problem.at(Counter(modulus=5), 128, 10_000),
    "counter 20": Problem.at(Counter(modulus=20), 256, 10_000),
    "fsm": Problem.at(Ring(states=4), 256, 10_000),
    "dyck 1": Problem.at(Dyck(kinds=1), 256, 10_000),
    "dyck 2": Problem.at(Dyck(kinds=2), 256, 10_000),
    "copy": Problem.at(Copy(), 256, 10_000),
    "recall": Problem.at(Recall(), 64, 10_000),
    "overwrite": Problem.at(Overwrite(), 128, 10_000),
    "reset": Problem.at(Overwrite(clear_probability=0.25), 128, 10_000),
    "keyed fsm": Problem.at(KeyedRing(), 128, 10_000),
    "S5 swaps": Problem.at(Group(group="S5", tokens="swaps"), 128, 10_000),
}

# --- formal (arXiv:2411.12537) --------------------------------------------------------------------

_TRAIN, _LONGEST = 40, 256


def _formal(task: SyntheticConfig, steps: int) -> Problem:
    """Trained on lengths from 3 to 40, read on 40 to 256."""
    short = dataclasses.replace(task, min_length=3)  # pyright: ignore[reportCallIssue]
    long = dataclasses.replace(task, min_length=_TRAIN)  # pyright: ignore[reportCallIssue]
    readings = Reading(task=short, length=_TRAIN), Reading(task=long, length=_LONGEST)
    return Problem(task=short, length=_TRAIN, steps=steps, readings=readings)


# --- ablations ------------------------------------------------------------------------------------


def _all_lengths(task: SyntheticConfig, length: int, steps: int) -> Problem:
    """Trained on lengths from 1 to `length`."""
    shorter = dataclasses.replace(task, min_length=1)  # pyright: ignore[reportCallIssue]
    return dataclasses.replace(Problem.at(task, length, steps), task=shorter)


# --- recall (arXiv:2312.04927) --------------------------------------------------------------------


def _multi_query() -> Problem:
    """Trained on the mixture of settings, read on each of them and on longer ones."""
    settings = (64, 4), (64, 8), (128, 16), (128, 32), (256, 64), (512, 128), (1024, 256)
    readings = tuple(
        Reading(task=MultiQuery(lengths=(n,), pairs=(pairs,), shares=(1.0,)), length=n)
        for n, pairs in settings
    )
    return Problem(task=MultiQuery(), length=256, steps=8_000, readings=readings)


SUITES: dict[str, Suite] = {
    "quick": Suite(
        about="parity and recall at the size of a laptop, in minutes",
        problems={
            "parity": Problem.at(Parity(), 32, 280, 128),
            "recall": Problem.at(Recall(keys=8, values=8, pairs=4), 16, 1_600, 64),
        },
        sizes=(Size(dim=32, depth=2, n_heads=4, n_state=16),),
        models=("e88", "e88_linear", "gdn", "gdn_negative", "transformer"),
        dtypes=("float32",),
        seeds=(0, 1),
        optimizer=OptimizerConfig(weight_decay=0.01, warmup_steps=40),
        batch_size=32,
        rates=(5e-3,),
        stop_at=0.999,
        read_batches=1,
        read_batch_size=512,
    ),
    "author": Suite(
        about="the tasks and the protocol of E88's author, with Gated DeltaNet as it can be",
        problems=_AUTHOR,
        sizes=(Size(dim=384, depth=4, n_heads=32),),
        models=("e88", "gdn", "gdn_negative"),
        dtypes=("bfloat16",),
        seeds=(42, 123, 456),
        optimizer=OptimizerConfig(optimizer="schedule_free", weight_decay=0.01, warmup_steps=0),
        batch_size=32,
        rates=(3e-4,),
        embedding_std=0.02,
        read_batches=1,
        read_batch_size=512,
    ),
    "groups": Suite(
        about="word problems of groups, by models of one layer and of four",
        problems={
            "S3": Problem.at(Group(group="S3"), 128, 4_000),
            "S4": Problem.at(Group(group="S4"), 128, 4_000),
            "A5": Problem.at(Group(group="A5"), 128, 4_000),
            "S5": Problem.at(Group(group="S5"), 128, 4_000),
            "S5 swaps": Problem.at(Group(group="S5", tokens="swaps"), 128, 4_000),
            "counter 5": Problem.at(Counter(modulus=5), 128, 4_000),
            "fsm": Problem.at(Ring(states=4), 128, 4_000),
            "parity": Problem.at(Parity(), 128, 4_000),
        },
        sizes=tuple(Size(dim=128, depth=depth, n_heads=8) for depth in (1, 4)),
        models=tuple(CONTROLS),
        dtypes=("bfloat16",),
        seeds=(0, 1, 2),
        optimizer=OptimizerConfig(weight_decay=1e-6, warmup_steps=100),
        batch_size=128,
        rates=RATES,
        stop_at=0.999,
    ),
    "ablations": Suite(
        about="small changes of E88 and of its training, on tasks that it does not learn at once",
        problems={
            "overwrite": Problem.at(Overwrite(), 128, 4_000),
            "counter 5": Problem.at(Counter(modulus=5), 128, 4_000),
            "counter 20": Problem.at(Counter(modulus=20), 256, 4_000),
            "counter 20, all lengths": _all_lengths(Counter(modulus=20), 256, 4_000),
            "S5": Problem.at(Group(group="S5"), 128, 4_000),
            "S5, all lengths": _all_lengths(Group(group="S5"), 128, 4_000),
        },
        sizes=(Size(dim=128, depth=2, n_heads=8),),
        models=("e88", "e88_linear", "e88_gate2", "e88_linear_gate2", *VARIANTS),
        dtypes=("bfloat16",),
        seeds=(0, 1, 2),
        optimizer=OptimizerConfig(weight_decay=1e-6, warmup_steps=100),
        batch_size=128,
        rates=RATES,
        stop_at=0.999,
    ),
    "formal": Suite(
        about="parity and modular arithmetic, trained on short expressions and read on long ones",
        problems={
            "parity": _formal(Parity(answers="last"), 5_000),
            "arithmetic": _formal(Arithmetic(), 20_000),
            "arithmetic, brackets": _formal(Arithmetic(brackets=True), 20_000),
        },
        sizes=(Size(dim=128, depth=2, n_heads=4),),
        models=tuple(CONTROLS),
        dtypes=("float32",),
        seeds=(0, 1, 2),
        optimizer=OptimizerConfig(weight_decay=0.1, warmup_steps=500),
        batch_size=256,
        rates=RATES,
        stop_at=0.9999,
        read_batches=32,
        read_batch_size=256,
    ),
    "recall": Suite(
        about="multi-query associative recall against the size of the state",
        problems={"mqar": _multi_query()},
        sizes=tuple(
            Size(dim=dim, depth=2, n_heads=dim // 16, conv_size=3) for dim in (64, 128, 256)
        ),
        models=tuple(CONTROLS),
        dtypes=("bfloat16",),
        seeds=(0, 1, 2),
        optimizer=OptimizerConfig(weight_decay=0.1, warmup_steps=800),
        batch_size=256,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        stop_at=0.999,
        read_batches=32,
    ),
}
"""The suites by name."""


def in_order(name: str, lines: Iterable[Record]) -> list[Record]:
    """The lines of a suite in its order, as devices may have added them in another."""
    problems, models = ({x: i for i, x in enumerate(xs)} for xs in (SUITES[name].problems, MODELS))

    def place(line: Record) -> tuple[Any, ...]:
        cell = cell_of(line)  # perhaps of another version
        at = problems.get(cell.problem, len(problems)), cell.depth, cell.dim, cell.dtype
        model = models.get(cell.model, len(models))
        return *at, model, line["seed"], line["learning_rate"]

    return sorted(lines, key=place)
