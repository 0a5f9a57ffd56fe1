"""The training program as its users run it: whole runs in processes of their own."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from harness.trained import load_trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = [
    *"--dim 16 --n-heads 2 --n-state 4 --depth 1 --seq-len 32 --batch-size 4".split(),  # noqa: SIM905
    *"--eval-every 50 --eval-bytes 500 --save-every 25 --log-every 5 --sample-bytes 12".split(),  # noqa: SIM905
]


def command(program: str, *flags: str) -> list[str]:
    return [sys.executable, str(EXPERIMENTS / program), *flags]


def run(cwd: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(program, *flags), cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@contextlib.contextmanager
def started(cwd: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A training process, killed at the end if it still runs."""
    argv = command("train_byte_lm.py", *flags)
    with subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Returns when the process has printed that it did `step` steps."""
    assert process.stdout is not None
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return
    raise AssertionError(f"the run ended before step {step}")


def parameters(directory: Path) -> list[np.ndarray]:
    model, _ = load_trained(directory, latest=True)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def records(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "bytes_per_second"} for line in lines
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that a tiny model learns: a rhyme over and over."""
    path = tmp_path_factory.mktemp("corpus") / "rhyme.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 steps that nothing disturbs."""
    cwd = tmp_path_factory.mktemp("whole")
    done = run(cwd, "train_byte_lm.py", *TINY, "--steps", "200", "--data", str(corpus))
    assert done.returncode == 0, done.stderr
    assert "validation" in done.stdout
    (directory,) = (cwd / "runs").iterdir()
    return directory


def test_a_run_leaves_what_its_user_needs(whole: Path):
    described = json.loads((whole / "run.json").read_text())
    assert described["config"]["steps"] == 200
    assert described["versions"]["jax"] == jax.__version__
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "sample.txt").read_text().startswith("def ")
    log = records(whole)
    validation = [record for record in log if record["kind"] == "validation"]
    assert [record["step"] for record in validation] == [50, 100, 150, 200]
    assert validation[-1]["bits_per_byte"] < 3 < 4 < validation[0]["bits_per_byte"]
    assert len([record for record in log if record["kind"] == "train"]) == 40
    events = EventAccumulator(str(whole / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert len(events.Tensors("train/loss")) == 40


@pytest.mark.parametrize("stateful", [False, True])
def test_killed_and_resumed_ends_with_identical_parameters(
    corpus: Path, whole: Path, tmp_path: Path, stateful: bool
):
    flags = [*TINY, "--steps", "200", "--data", str(corpus), "--out", "run"]
    if stateful:
        flags.append("--stateful")
        reference = tmp_path / "whole"
        done = run(tmp_path, "train_byte_lm.py", *flags, "--out", str(reference))
        assert done.returncode == 0, done.stderr
    else:
        reference = whole
    with started(tmp_path, *flags) as process:
        wait_for_step(process, 100)
        process.send_signal(signal.SIGKILL)
    saved = (tmp_path / "run" / "checkpoints").iterdir()
    newest = max(int(path.name) for path in saved if path.name.isdigit())
    assert 50 <= newest < 200
    resumed = run(tmp_path, "train_byte_lm.py", "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing from step {newest}" in resumed.stdout
    for ours, expected in zip(parameters(tmp_path / "run"), parameters(reference), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert records(tmp_path / "run") == records(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_first(corpus: Path, tmp_path: Path, number: signal.Signals):
    flags = [*TINY, "--save-every", "1000000", "--eval-every", "1000000", "--out", "run"]
    flags += ["--steps", "1000000", "--data", str(corpus)]
    with started(tmp_path, *flags) as process:
        wait_for_step(process, 20)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert int(checkpoint.name) == records(tmp_path / "run")[-1]["step"]


def test_steps_that_are_not_finite_stop_the_run(corpus: Path, tmp_path: Path):
    done = run(
        tmp_path,
        "train_byte_lm.py",
        *TINY,
        *["--data", str(corpus), "--out", "run", "--steps", "400", "--max-skipped-steps", "10"],
        *["--learning-rate", "1e30", "--warmup-steps", "0"],
    )
    assert done.returncode == 1
    assert re.search(r"stopped at step \d+: \d+ steps in a row .* not finite", done.stderr)
    assert "Traceback" not in done.stderr
    assert "steps skipped: not finite" in done.stdout
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    for array in parameters(tmp_path / "run"):
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--dimm 64", "unknown argument --dimm: did you mean --dim?"),
        ("extra", "unknown argument extra"),
        ("--dim many", "invalid literal for int"),
        ("--optimizer sgd", "invalid choice 'sgd'"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--learning-rate -1", "--learning-rate must be above 0, got -1"),
        ("--tie-kv --expansion 2", "needs expansion = 1, got 2.0"),
        ("--vocab-size 300", "--vocab-size must be 256"),
        ("--data nowhere.txt", "nowhere.txt is no file"),
        ("--data pipe", "pipe is not a regular file"),
        ("--data empty.txt", "empty.txt holds no bytes"),
        ("--data short.txt", "corpus of 40 bytes leaves 38 for training"),
        ("--resume", "there is no run under runs/"),
        ("--out nothing --resume", "nothing holds no run"),
        ("--out taken", "taken already holds a run"),
        ("--out full", "full is not empty"),
        ("--out short.txt", "short.txt is a file"),
        ("--out short.txt --resume", "short.txt holds no run"),
        ("--out short.txt/deeper", "short.txt/deeper: Not a directory"),
        ("--out taken --resume --steps 100", "has done 200 steps: raise --steps"),
        ("--implementation mosaic_gpu", "use implementation='scan'"),
        ("--seed 4294967296", "--seed must be below 2**32"),
        ("--dtype float64", "--dtype float64 is for comparisons"),
        ("--out taken --resume --dim 32", "another configuration, --dim 16 (not 32)"),
        ("--out taken --resume --data short.txt", "another configuration, --data"),
    ],
)
def test_mistakes_get_one_sentence(whole: Path, tmp_path: Path, flags: str, sentence: str):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("x" * 40)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "taken").symlink_to(whole)
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*")), (whole / "run.json").read_bytes()
    done = run(tmp_path, "train_byte_lm.py", *flags.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert (sorted(tmp_path.rglob("*")), (whole / "run.json").read_bytes()) == before


def test_a_changed_corpus_is_not_resumed(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    described = (tmp_path / "run" / "run.json").read_text()
    other = re.sub(r'"fingerprint": "[0-9a-f]+"', '"fingerprint": "0123"', described)
    assert other != described
    (tmp_path / "run" / "run.json").write_text(other)
    done = run(tmp_path, "train_byte_lm.py", "--out", "run", "--resume", "--steps", "300")
    assert done.returncode == 2
    assert "the corpus is not the one" in done.stderr


def test_help_is_quick_and_says_units():
    began = time.perf_counter()
    done = run(EXPERIMENTS, "train_byte_lm.py", "--help")
    assert time.perf_counter() - began < 5
    assert done.returncode == 0
    for flag in ("--data", "--seq-len", "--learning-rate", "--n-state", "--resume"):
        assert flag in done.stdout


def test_other_devices_get_a_warning(whole: Path, tmp_path: Path):
    """The devices on which a run began are part of its bits, so it says where they differ."""
    shutil.copytree(whole, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**described, "devices": "1 x abacus"}))
    done = run(tmp_path, "train_byte_lm.py", "--out", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert "warning: the run began on 1 x abacus" in done.stderr
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["devices"] == "1 x abacus"
    assert described["resumed"][0]["step"] == 200


def test_a_reader_that_stops_reading(whole: Path):
    sample = subprocess.Popen(
        command("sample.py", str(whole), "--length", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert sample.stdout is not None
    assert sample.stdout.read(4) == b"def "
    sample.stdout.close()
    with sample:
        assert sample.stderr is not None
        assert sample.stderr.read() == b""
        assert sample.wait(timeout=60) == 128 + signal.SIGPIPE


def test_sampling_from_a_run(whole: Path, tmp_path: Path):
    flags = [str(whole), "--length", "60", "--prompt", "The quick", "--seed", "3"]
    done = run(tmp_path, "sample.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The quick")
    greedy = run(tmp_path, "sample.py", *flags, "--temperature", "0").stdout
    assert len(greedy) == len("The quick") + 60 + 1
    assert run(tmp_path, "sample.py", *flags).stdout == done.stdout
    assert run(tmp_path, "sample.py", *flags[:-1], "4").stdout != done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("nowhere", "nowhere holds no run"),
        ("", "Missing"),
        ("RUN --top-p 3", "top_p must be in (0, 1], got 3.0"),
        ("RUN --lenght 3", "did you mean --length?"),
        ("RUN --length -3", "--length must be at least 0 bytes, got -3"),
    ],
)
def test_sampling_mistakes_get_one_sentence(whole: Path, tmp_path: Path, flags: str, sentence: str):
    done = run(tmp_path, "sample.py", *flags.replace("RUN", str(whole)).split())
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
