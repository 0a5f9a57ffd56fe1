"""Suites of trainings on synthetic tasks, by E88 and its controls."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from experiments import cli
from experiments.cli import require
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness import devices, run_directory
from experiments.harness.interrupts import as_ctrl_c
from experiments.harness.ownership import owned
from experiments.harness.progress import Report
from experiments.trials import report, running
from experiments.trials.records import RUNS, Cell, Record, Records, groups
from experiments.trials.scheduling import Schedule
from experiments.trials.suites import SUITES, Suite, in_order


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpressivityConfig:
    """Train the models of a suite on its tasks, read them at many lengths, and compare them.

    Every run adds a JSON line to runs.jsonl in --out; runs that it has are skipped, so that the
    same command goes on with an interrupted suite. Tables, CSV and plots are written there too.
    """

    suite: Annotated[
        tyro.conf.Positional[Literal[tuple(SUITES)]],  # pyright: ignore
        tyro.conf.arg(
            metavar="SUITE", help="; ".join(f"{name}: {x.about}" for name, x in SUITES.items())
        ),
    ]
    problems: tuple[str, ...] = ()
    """Problems of the suite; none for all."""
    models: tuple[str, ...] = ()
    """Models, also others than the suite's; none for the suite's."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Compute dtypes; none for the suite's."""
    depths: tuple[int, ...] = ()
    """Depths among the suite's; none for all."""
    seeds: tuple[int, ...] = ()
    """Seeds; none for the suite's."""
    minutes: float | None = None
    """Begin nothing new after so many minutes."""
    list: bool = False
    """Print what the suite is and what is left of it, and train nothing."""
    out: Path | None = None
    """Directory of the results; runs/expressivity-SUITE by default."""

    def __post_init__(self) -> None:
        require(self, "depths", minimum=1)
        require(self, "seeds", minimum=0)
        require(self, "minutes", above=0)


def main(args: Sequence[str]) -> None:
    """Parses, does what is left of the suite, writes tables and plots."""
    config = cli.parse(ExpressivityConfig, args)
    try:
        suite = running.selected(
            SUITES[config.suite],
            problems=config.problems,
            models=config.models,
            dtypes=config.dtypes,
            depths=config.depths,
            seeds=config.seeds,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    directory = config.out or Path("runs") / f"expressivity-{config.suite}"
    if config.list:
        print(describe(suite, running.left(suite, Records(directory / RUNS))))
        return
    devices.set_up()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {directory} cannot be made: {error.strerror}.") from None
    with owned(directory), as_ctrl_c():
        records = Records(directory / RUNS)
        try:
            complete, failed = _run(suite, records, config.minutes)
        finally:
            if lines := in_order(config.suite, records.lines):
                report.write(directory, lines, f"Suite {config.suite}", suite.about)
                _draw(directory, lines, config.suite)
    if lines:
        print(report.markdown(lines))
    print(f"\nresults are in {directory}: {RUNS}, {report.MARKDOWN}, {report.CSV} and plots")
    if failed:
        raise RunStopped(
            f"failed: {'; '.join(map(str, failed))}. The same command tries again.",
            exit_code=1,
        )
    if not complete:
        raise RunStopped("stopped by --minutes: the same command goes on.", exit_code=3)


def _draw(directory: Path, lines: Sequence[Record], suite: str) -> None:
    with run_directory.optional(directory / "accuracy.png"):
        from experiments.trials import plot  # a failure of matplotlib's costs no result

        plot.write(directory, lines, f"Suite {suite}")


def describe(suite: Suite, left: Sequence[running.Work]) -> str:
    """The suite and what is left of it."""
    cells = len(list(running.cells(suite)))
    missing = len({work.cell for work in left})
    lines = [f"{suite.about}: {cells} cells of {len(suite.seeds)} seeds, {missing} left"]
    lines += [
        f"  {work.cell}: {work.kind}, {work.lanes} x {work.trial.steps:,} steps" for work in left
    ]
    return "\n".join(lines)


def _run(suite: Suite, records: Records, minutes: float | None) -> tuple[bool, list[Cell]]:
    """Does what is left; returns whether all of it is done, and the cells that failed."""
    left, failures = running.left(suite, records), list[Cell]()
    with Report(steps=sum(work.lane_steps for work in left)) as shown:
        shown.say(describe(suite, left).partition("\n")[0])

        def advanced(work: running.Work, steps: int) -> None:
            shown.show(steps, f"{work.cell}, {work.kind}")

        def finished(work: running.Work, done: int, seconds: float) -> None:
            what = f"{work.cell}: {_outcome(work, records)}, {seconds:.0f} s"
            shown.say(f"{done}/{len(left)}  {what}")

        def failed(work: running.Work, error: Exception) -> None:
            failures.append(work.cell)
            shown.say(f"{work.cell}: failed, {str(error).partition(chr(10))[0]}")

        end = None if minutes is None else time.monotonic() + 60 * minutes
        schedule = Schedule(left, advanced=advanced, finished=finished, failed=failed, end=end)
        complete = schedule.run([running.Runner(suite, records, x) for x in jax.local_devices()])
    return complete, failures


def _outcome(work: running.Work, records: Records) -> str:
    if work.kind == "search":
        return f"rate {running.best_rate(records.search(work.cell)):g}"
    group = groups(records.lines)[work.cell]
    return f"{report.accuracy(group)} at {group.readings[0]}, horizon {group.horizon()}"


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
