"""Runs of two processes: what they write, and how they end together, are killed and go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.harness.processes import HEARTBEAT_SECONDS
from tests.experiments.test_train_byte_lm import EXPERIMENTS, TINY, records

FLAGS = [*TINY, "--steps", "200", "--eval-every", "100"]
ENDED_SECONDS = 60
"""In which the death of a process ends the others."""
DEVICES = "--xla_force_host_platform_device_count"


pytestmark = pytest.mark.usefixtures("compile_once")


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
        environment = os.environ | {"XLA_FLAGS": f"{DEVICES}={devices}"}
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

    def after(self, step: int, number: signal.Signals, to: int) -> None:
        """Sends a signal to one of them once the first has printed that it did a step."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        for line in stdout:
            self.read += line
            if line.startswith("step ") and int(line[5:].split("/")[0]) >= step:
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
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    cwd = tmp_path_factory.mktemp("whole")
    (cwd / "rhyme.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    first, second = train(cwd, *FLAGS, "--data", "rhyme.txt", "--out", "run")
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert "4 x cpu of 2 processes" in first.stdout
    assert "best validation" in first.stdout
    assert "run" not in second.stdout  # though the CPU's collectives print
    return cwd


def test_what_one_process_writes(whole: Path) -> None:
    found = {path.name for path in (whole / "run").iterdir()}
    files = {"corpus.jsonl", "metrics.jsonl", "run.json", "sample.txt", "loss.png"}
    assert found == {*files, "checkpoints", "tensorboard"}
    kinds = [str(record["kind"]) for record in records(whole / "run")]
    assert (kinds.count("train"), kinds.count("validation")) == (40, 2)
    config = json.loads((whole / "run" / "run.json").read_text())["config"]
    assert "launch" not in config


def test_a_mistake_ends_both_with_one_sentence(whole: Path) -> None:
    first, second = train(whole, *FLAGS, "--data", "rhyme.txt", "--out", "run")
    assert (first.code, second.code) == (2, 2)
    assert "run already holds a run" in first.stderr
    assert "run already holds a run" not in second.stderr


def test_killed_stopped_and_continued(whole: Path, tmp_path: Path) -> None:
    """A killed process loses no step that a checkpoint has, a signal none at all, and the losses
    are those of the undisturbed run."""
    shutil.copy(whole / "rhyme.txt", tmp_path)
    killed = Processes(tmp_path, [*FLAGS, "--data", "rhyme.txt", "--out", "run"])
    killed.after(30, signal.SIGKILL, to=1)
    began = time.monotonic()
    first, second = killed.end()
    assert time.monotonic() - began < ENDED_SECONDS
    assert HEARTBEAT_SECONDS < ENDED_SECONDS
    assert second.code == -signal.SIGKILL
    assert first.code != 0
    assert "another task died" in first.stderr
    saved = max(steps(tmp_path / "run"))
    assert saved >= 25

    resumed = Processes(tmp_path, ["--out", "run", "--resume", "--save-every", "1000"])
    resumed.after(saved + 10, signal.SIGTERM, to=1)
    first, second = resumed.end()
    assert f"continuing from step {saved}" in first.stdout
    assert (first.code, second.code) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    stopped = max(steps(tmp_path / "run"))
    assert f"stopped by SIGTERM at step {stopped}: continue with" in first.stderr
    assert "stopped by" not in second.stderr

    first, second = train(tmp_path, "--out", "run", "--resume", "--save-every", "25")
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert f"continuing from step {stopped}, bit for bit" in first.stdout
    assert records(tmp_path / "run") == records(whole / "run")


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """The directory of that run without its last 25 steps."""
    shutil.copytree(whole, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "run" / "checkpoints" / "200")
    return tmp_path / "whole" / "run"


def test_continued_by_one_process(whole: Path, unfinished: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "train_byte_lm.py"), "--out", "run", "--resume"],
        cwd=unfinished.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4 x cpu of 2 processes, not " in done.stderr
    assert "will not continue bit for bit" in done.stderr
    assert "continuing from step 175, equal but for rounding" in done.stdout
    assert_close(unfinished, whole / "run")


def test_continued_with_a_head_on_each_process(whole: Path, unfinished: Path) -> None:
    flags = ["--out", "run", "--resume", "--mesh", "heads=2"]
    first, second = Processes(unfinished.parent, flags, devices=1).end()
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert "2 x cpu of 2 processes (heads=2)" in first.stdout
    assert "continuing from step 175, equal but for rounding" in first.stdout
    assert_close(unfinished, whole / "run")


def assert_close(run: Path, other: Path) -> None:
    """The metrics of both are equal but for rounding."""
    for after, before in zip(records(run), records(other), strict=True):
        assert after.pop("kind") == before.pop("kind")
        assert after == pytest.approx(before, rel=1e-3)


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*"))
