"""Disturbs training runs at random moments, resumes them, compares them with undisturbed ones."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.flags import require_writable
from experiments import cli
from experiments.cli.errors import RunStopped
from experiments.harness.progress import Report

TRAIN = Path(__file__).parents[1] / "experiments" / "train_byte_lm.py"
STEPS = 240
# Records, checkpoints and evaluations at steps that seldom coincide.
FLAGS = (
    f"--dim 16 --n-heads 2 --n-state 4 --depth 1 --seq-len 16 --batch-size 2 --steps {STEPS} "
    "--log-every 7 --save-every 16 --eval-every 60 --eval-bytes 256 --sample-bytes 0"
).split()
KINDS = {
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {128 + signal.SIGTERM, -signal.SIGTERM},
    "closed output": set(),
    "full disk": {1, 2},
}
"""Kinds of disturbance, each with the exit codes besides 0 that a run may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillConfig:
    """Disturb training runs, resume them, and compare parameters bit for bit and metrics.

    A run is killed by SIGKILL or SIGTERM, its standard output is closed, or its files may grow no
    more (RLIMIT_FSIZE, which acts as a full disk and needs no rights to mount one). Half of the
    runs are disturbed a second time. Needs Linux.
    """

    runs: int = 100
    """Runs in all, of each kind in turn."""
    jobs: int = 2
    """Runs at once."""
    seed: int = 0
    """Seed of the random moments."""
    json: Path | None = None
    """File to write what happened to each run to, as JSON."""
    keep: Path | None = None
    """Directory for the runs, to look at afterwards; None for a temporary one."""

    def __post_init__(self) -> None:
        for flag, value in (("runs", self.runs), ("jobs", self.jobs)):
            if value < 1:
                raise ValueError(f"--{flag} must be at least 1, got {value}.")
        require_writable(self.json)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    flags: list[str]
    parameters: list[Any]
    metrics: list[dict[str, Any]]
    n_lines: int
    """Lines that it printed."""
    seconds_to_first: float
    """Seconds until the first line."""


@dataclasses.dataclass
class Outcome:
    """Outcome of a run."""

    kind: str
    flags: list[str]
    disturbed_after: list[float] = dataclasses.field(default_factory=list)
    """Seconds after the start of each disturbed process."""
    exit_codes: list[int] = dataclasses.field(default_factory=list)
    """Exit codes of the run's processes."""
    identical: bool = False
    """Parameters and metrics at the end are those of the undisturbed run."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """Other findings."""


def start(directory: Path, flags: Sequence[str], errors: Path) -> subprocess.Popen[str]:
    """A process that begins the run in `directory`, or goes on with it if it was begun."""
    going_on = (directory / "run.json").exists()
    argv = [sys.executable, str(TRAIN), "--out", str(directory)]
    argv += ["--resume"] if going_on else flags
    with errors.open("w") as file:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=file, text=True)


def disturb(process: subprocess.Popen[str], kind: str, rng: random.Random) -> None:
    """Does to a running process what `kind` says."""
    assert process.stdout is not None
    if kind == "closed output":
        process.stdout.close()
    elif kind == "full disk":
        limit = rng.randrange(3000)  # less than a checkpoint's largest file has
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    else:
        process.send_signal(signal.Signals[kind])


def wait_for_a_moment(
    process: subprocess.Popen[str], reference: Reference, rng: random.Random
) -> bool:
    """Waits until a random moment of the run's life; returns whether it still goes on."""
    assert process.stdout is not None
    line = rng.randrange(reference.n_lines)
    if line == 0:
        time.sleep(rng.uniform(0, reference.seconds_to_first))
    for _ in range(line):
        if not process.stdout.readline():
            return False
    time.sleep(rng.uniform(0, 0.05))
    return process.poll() is None


def parameters(directory: Path) -> list[Any]:
    """The weights of the newest checkpoint, which must be the last of the run."""
    import jax
    import numpy as np
    from flax import nnx

    from experiments.tasks.bytes import ByteLMConfig
    from experiments.trained import load_trained

    model, step = load_trained(directory, ByteLMConfig, latest=True)
    assert step == STEPS, f"the newest checkpoint is of step {step}"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run without their times."""
    from experiments.harness.metrics import read_metrics

    records = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "bytes_per_second"} for record in records]


def undisturbed(where: Path, flags: list[str]) -> Reference:
    """A run of `flags` in `where`."""
    began = time.perf_counter()
    with start(where / "run", flags, where / "errors") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds = time.perf_counter() - began
        lines = [first, *process.stdout]
    if process.returncode:
        raise RunStopped((where / "errors").read_text().strip(), exit_code=1)
    return Reference(flags, parameters(where / "run"), metrics(where / "run"), len(lines), seconds)


def one_run(where: Path, reference: Reference, kind: str, rng: random.Random) -> Outcome:
    """A run that is disturbed once or twice, then comes to its end."""
    outcome = Outcome(kind, reference.flags)
    directory, errors = where / "run", where / "errors"
    where.mkdir()
    for _ in range(rng.choice((1, 2))):
        began = time.perf_counter()
        with start(directory, reference.flags, errors) as process:
            hit = wait_for_a_moment(process, reference, rng)
            if hit:
                outcome.disturbed_after.append(round(time.perf_counter() - began, 3))
                disturb(process, kind, rng)
            if not process.stdout.closed:  # pyright: ignore[reportOptionalMemberAccess]
                process.communicate()
        note_end(outcome, process.returncode, KINDS[kind] | {0} if hit else {0}, errors)
    with start(directory, reference.flags, errors) as process:
        process.communicate()
    note_end(outcome, process.returncode, {0}, errors)
    try:
        compare(outcome, directory, reference)
    except Exception as error:  # nothing to restore, say
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    return outcome


def note_end(outcome: Outcome, exit_code: int, allowed: set[int], errors: Path) -> None:
    """Notes how a process ended, and whether it said so in a sentence."""
    outcome.exit_codes.append(exit_code)
    said = errors.read_text()
    if exit_code not in allowed or "Traceback" in said:
        outcome.wrong.append(f"exit code {exit_code}: {said[-2000:]}")


def compare(outcome: Outcome, directory: Path, reference: Reference) -> None:
    """Notes what of a run differs from the undisturbed one."""
    pairs = zip(parameters(directory), reference.parameters, strict=True)
    differing = sum(ours.tobytes() != expected.tobytes() for ours, expected in pairs)
    if differing:
        outcome.wrong.append(f"{differing} of {len(reference.parameters)} parameters differ")
    if metrics(directory) != reference.metrics:
        outcome.wrong.append("metrics.jsonl differs")
    outcome.identical = not differing and metrics(directory) == reference.metrics


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind."""
    rows = [
        "| disturbed by | runs | disturbed | exit codes | identical | faults |",
        "|" + " --- |" * 6,
    ]
    for kind in KINDS:
        ours = [outcome for outcome in outcomes if outcome.kind == kind]
        if ours:
            counts = collections.Counter(code for one in ours for code in one.exit_codes[:-1])
            codes = ", ".join(f"{code}: {n}" for code, n in sorted(counts.items()))
            disturbed = sum(len(one.disturbed_after) for one in ours)
            identical = sum(one.identical for one in ours)
            faults = sum(bool(one.wrong) for one in ours)
            rows.append(
                f"| {kind} | {len(ours)} | {disturbed} | {codes} | {identical} | {faults} |"
            )
    return "\n".join(rows)


def kill_runs(config: KillConfig, where: Path) -> list[Outcome]:
    """The outcomes of all runs, each in a directory of its own under `where`."""
    corpus = where / "corpus.txt"
    corpus.write_bytes(random.Random(0).randbytes(4000).hex().encode() * 4)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(where / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    references = []
    for n, extra in enumerate(([], ["--stateful", "--optimizer", "schedule_free"])):
        for name in (f"compile{n}", f"reference{n}"):  # the first fills the cache of programs
            (where / name).mkdir()
            reference = undisturbed(where / name, ["--data", str(corpus), *FLAGS, *extra])
        references.append(reference)
    kinds = list(KINDS)
    outcomes = []
    with (
        Report(steps=config.runs) as report,
        concurrent.futures.ThreadPoolExecutor(config.jobs) as pool,
    ):
        runs = [
            pool.submit(
                one_run,
                where / str(n),
                references[n // len(kinds) % 2],
                kinds[n % len(kinds)],
                random.Random(f"{config.seed}/{n}"),
            )
            for n in range(config.runs)
        ]
        for run in concurrent.futures.as_completed(runs):
            outcomes.append(run.result())
            for wrong in outcomes[-1].wrong:
                report.say(f"{outcomes[-1].kind}: {wrong}")
            report.advance(len(outcomes), f"{sum(one.identical for one in outcomes)} identical")
    return outcomes


def main(args: Sequence[str]) -> None:
    """Parses, disturbs, prints."""
    config = cli.parse(KillConfig, args)
    began = time.perf_counter()
    where = config.keep or Path(tempfile.mkdtemp())
    where.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = kill_runs(config, where)
    finally:
        if config.keep is None:
            shutil.rmtree(where, ignore_errors=True)
    seconds = round(time.perf_counter() - began)
    if config.json is not None:
        from experiments.harness.run_directory import versions

        said = {"seed": config.seed, "seconds": seconds, "versions": versions()}
        said["runs"] = [dataclasses.asdict(outcome) for outcome in outcomes]
        config.json.write_text(json.dumps(said, indent=2) + "\n")
    print(table(outcomes))
    print(f"{len(outcomes)} runs in {seconds} s")
    if faulty := sum(bool(outcome.wrong) for outcome in outcomes):
        raise RunStopped(f"{faulty} of {len(outcomes)} runs were not as they should be.", 1)


if __name__ == "__main__":
    cli.run(main)
