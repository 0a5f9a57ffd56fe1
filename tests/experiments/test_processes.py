"""Runs of two processes: what they write, and how they end together, are killed and go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import train_byte_lm
from experiments.harness.processes import HEARTBEAT_SECONDS
from tests.experiments.test_train_byte_lm import EXPERIMENTS, TINY, checkpoints, records

FLAGS = [*TINY, "--steps", "100", "--eval-every", "50", "--save-every", "25"]
FLAGS += ["--data", "rhyme.txt", "--out", "run"]
ENDED_SECONDS = 60
"""In which the death of a process ends the others."""


# `killed` first: its run ends by itself, after the heartbeats, while others go on.
pytestmark = pytest.mark.usefixtures("compile_once", "killed")


class Ended(NamedTuple):
    """Exit code and output of a process."""

    code: int
    stdout: str
    stderr: str


class Processes:
    """The two processes of a run, of one CPU device each or more."""

    def __init__(self, cwd: Path, flags: Sequence[str], devices: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
        command = [sys.executable, str(EXPERIMENTS / "train_byte_lm.py"), *flags, *launch]
        count = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}
        self.processes = [
            subprocess.Popen(
                [*command, "--process", str(index)],
                cwd=cwd,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for index in (0, 1)
        ]
        self.read = ""
        """Output of the first one that `after` has read."""

    def after(self, printed: str, number: signal.Signals, to: int) -> None:
        """Sends a signal to one of them once the first has printed a line that begins so."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        for line in stdout:
            self.read += line
            if line.startswith(printed):
                self.processes[to].send_signal(number)
                return
        raise AssertionError(self.end())

    def end(self) -> list[Ended]:
        """Waits for both, and kills what still runs after two minutes."""
        try:
            (out, err), others = (p.communicate(timeout=120) for p in self.processes)
        finally:
            for process in self.processes:
                process.kill()
        first, second = (process.returncode for process in self.processes)
        return [Ended(first, self.read + out, err), Ended(second, *others)]


def train(cwd: Path, *flags: str) -> list[Ended]:
    return Processes(cwd, flags).end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, compile_once: None) -> Path:
    """The directory of a run that nothing disturbs."""
    cwd = tmp_path_factory.mktemp("whole")
    (cwd / "rhyme.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    first, second = train(cwd, *FLAGS)
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert "4 x cpu of 2 processes" in first.stdout
    assert "best validation" in first.stdout
    assert "run" not in second.stdout  # though the CPU's collectives print
    return cwd / "run"


class Killed(NamedTuple):
    """A run whose second process was killed."""

    cwd: Path
    ended: Future[tuple[list[Ended], float]]
    """And the seconds from then until both had ended."""


@pytest.fixture(scope="module")
def killed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    cwd = tmp_path_factory.mktemp("killed")
    shutil.copy(whole.parent / "rhyme.txt", cwd)
    processes = Processes(cwd, FLAGS)
    # Well before the checkpoint of step 75, at which the first would see a closed connection.
    processes.after("step 55/", signal.SIGKILL, to=1)
    began = time.monotonic()

    def end() -> tuple[list[Ended], float]:
        return processes.end(), time.monotonic() - began

    with ThreadPoolExecutor() as pool:
        yield Killed(cwd, pool.submit(end))


def test_what_one_process_writes(whole: Path) -> None:
    files = {"corpus.jsonl", "metrics.jsonl", "run.json", "sample.txt", "loss.png"}
    assert {path.name for path in whole.iterdir()} == {*files, "checkpoints", "tensorboard"}
    kinds = [str(record["kind"]) for record in records(whole)]
    assert (kinds.count("train"), kinds.count("validation")) == (20, 2)
    config = json.loads((whole / "run.json").read_text())["config"]
    assert "launch" not in config


def test_a_mistake_ends_both_with_one_sentence(whole: Path) -> None:
    first, second = train(whole.parent, *FLAGS)
    assert (first.code, second.code) == (2, 2)
    assert "run already holds a run" in first.stderr
    assert "run already holds a run" not in second.stderr


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run without its last checkpoint."""
    shutil.copytree(whole.parent, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "run" / "checkpoints" / "100")
    return tmp_path / "copy" / "run"


def test_continued_by_one_process(
    whole: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_byte_lm.main(["--out", str(unfinished), "--resume"])
    said = capsys.readouterr()
    assert "4 x cpu of 2 processes, not " in said.err
    assert "will not continue bit for bit" in said.err
    assert "continuing from step 75, equal but for rounding" in said.out
    assert_close(unfinished, whole)


def test_continued_with_a_head_on_each_process(whole: Path, unfinished: Path) -> None:
    flags = ["--out", "run", "--resume", "--mesh", "heads=2"]
    first, second = Processes(unfinished.parent, flags, devices=1).end()
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert "2 x cpu of 2 processes (heads=2)" in first.stdout
    assert "continuing from step 75, equal but for rounding" in first.stdout
    assert_close(unfinished, whole)


def assert_close(run: Path, other: Path) -> None:
    """The metrics of both are equal but for rounding."""
    for after, before in zip(records(run), records(other), strict=True):
        assert after.pop("kind") == before.pop("kind")
        assert after == pytest.approx(before, rel=1e-3)


def test_killed_stopped_and_continued(whole: Path, killed: Killed) -> None:
    """A killed process loses no step that a checkpoint has, a signal none at all, and the losses
    are those of the undisturbed run."""
    (first, second), seconds = killed.ended.result()
    assert seconds < ENDED_SECONDS
    assert HEARTBEAT_SECONDS < ENDED_SECONDS
    assert second.code == -signal.SIGKILL
    assert first.code != 0
    assert "another task died" in first.stderr
    saved = max(checkpoints(killed.cwd / "run"))
    assert saved >= 25

    resumed = Processes(killed.cwd, ["--out", "run", "--resume", "--save-every", "1000"])
    # Before its first step: the runtime looks for signals once a second.
    resumed.after(f"continuing from step {saved}, bit for bit", signal.SIGTERM, to=1)
    first, second = resumed.end()
    assert (first.code, second.code) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    stopped = max(checkpoints(killed.cwd / "run"))
    assert stopped > saved
    assert f"stopped by SIGTERM at step {stopped}: continue with" in first.stderr
    assert "stopped by" not in second.stderr

    first, second = train(killed.cwd, "--out", "run", "--resume", "--save-every", "25")
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert f"continuing from step {stopped}, bit for bit" in first.stdout
    assert records(killed.cwd / "run") == records(whole)
