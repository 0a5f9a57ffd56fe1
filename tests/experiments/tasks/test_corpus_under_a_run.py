"""A corpus that changes while a run reads it, and one that is elsewhere when it goes on."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import train_byte_lm
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness import program, train
from experiments.harness.step import StepMetrics
from experiments.tasks.base import Batch
from experiments.tasks.bytes import ByteLMConfig, RandomWindows
from experiments.tasks.corpus import LISTING, Corpus

TINY = [
    *"--dim 16 --n-heads 2 --n-state 4 --depth 1 --seq-len 16 --batch-size 4".split(),  # noqa: SIM905
    *"--eval-bytes 256 --sample-bytes 0 --log-every 2".split(),  # noqa: SIM905
]


parse_args = functools.partial(program.parse_args, ByteLMConfig)


def no_training(state: Any, batch: Batch) -> tuple[Any, StepMetrics]:
    """A step that changes nothing, as compiling one takes seconds."""
    del batch
    nothing: Any = np.float32(0)
    return state, StepMetrics(nothing, nothing, nothing, nothing, nothing)


def test_the_run_stops_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.bin"
    text.write_bytes(b"The quick brown fox. " * 200)
    content = text.read_bytes()
    read = RandomWindows.read_rows

    def cut_short(windows: RandomWindows, step: int, rows: slice) -> Batch:
        if step == 5:
            os.truncate(text, 10)
        return read(windows, step, rows)

    flags = [*TINY, "--data", ".", "--out", "runs/x", "--steps", "9"]
    with monkeypatch.context() as patch:
        patch.setattr(RandomWindows, "read_rows", cut_short)
        patch.setattr(train, "compile_train_step", lambda *_: no_training)
        with pytest.raises(RunStopped) as stopped:
            train_byte_lm.main(flags)
    assert str(stopped.value) == (
        f"stopped at step 5: {text} was cut short, from {len(content):,} bytes to 10. When it is "
        "as it was, continue with --out runs/x --resume."
    )
    assert stopped.value.exit_code == 1
    checkpoints = tmp_path / "runs" / "x" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.isdigit()] == ["5"]
    text.write_bytes(content)
    task = parse_args(["--out", "runs/x", "--resume"]).open_task()
    assert task.fingerprint() == Corpus.of([str(text)]).fingerprint()


@pytest.fixture
def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Corpus]:
    """The corpus of a run on two files in `texts/`, resumed from a folder beside it."""
    texts, run = tmp_path / "texts", tmp_path / "run"
    for folder in (texts, run, tmp_path / "beside"):
        folder.mkdir()
    for number, name in enumerate(("a", "b")):
        (texts / name).write_bytes(np.random.default_rng(number).bytes(2000))
    monkeypatch.chdir(tmp_path)
    config = parse_args([*TINY, "--data", "texts"])
    config.open_task().write(run)
    described = {"config": config.to_dict(), "devices": "", "versions": {}}
    (run / "run.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path / "beside")

    def resume(*flags: str) -> Corpus:
        task: Any = parse_args(["--out", "../run", "--resume", *flags]).open_task()
        return task._corpus

    return resume


Resume = Callable[..., Corpus]


def test_resumed_from_elsewhere(resumed: Resume, tmp_path: Path) -> None:
    (tmp_path / "texts" / "c").write_bytes(b"a new file is none of the run's")
    (tmp_path / "beside" / "texts").mkdir()
    corpus = resumed()
    assert corpus.files == (tmp_path / "texts" / "a", tmp_path / "texts" / "b")
    assert corpus.read(0, 2000).tobytes() == (tmp_path / "texts" / "a").read_bytes()


def test_a_file_that_grew(
    resumed: Resume, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts" / "b"
    before = resumed().read(0, 4000)
    with path.open("ab") as file:
        file.write(b"more")
    np.testing.assert_array_equal(resumed().read(0, 4000), before)
    assert capsys.readouterr().err == (
        f"warning: {path} has grown by 4 bytes since the run began: it goes on with the first "
        "2,000.\n"
    )


@pytest.mark.parametrize("what", ["other bytes", "cut short", "gone", "gone with its folder"])
def test_a_corpus_that_is_another(resumed: Resume, tmp_path: Path, what: str) -> None:
    path = tmp_path / "texts" / "b"
    if what == "other bytes":
        path.write_bytes(path.read_bytes()[::-1])
    elif what == "cut short":
        os.truncate(path, 1999)
    elif what == "gone":
        path.unlink()
    else:
        path.parent.rename(tmp_path / "moved")
        path = path.with_name("a")
    with pytest.raises(UsageError, match=r"the corpus is not the one that the run") as error:
        resumed()
    assert f" {path} " in str(error.value)
    assert "name it with --data" in str(error.value)


def test_a_corpus_that_moved(resumed: Resume, tmp_path: Path) -> None:
    before = resumed().read(0, 4000)
    (tmp_path / "texts").rename(tmp_path / "moved")
    corpus = resumed("--data", "../moved")
    np.testing.assert_array_equal(corpus.read(0, 4000), before)
    corpus = resumed("--data", "../moved/a", "../moved/b")
    np.testing.assert_array_equal(corpus.read(0, 4000), before)
    with pytest.raises(UsageError, match=r"another configuration, --data .*texts \(not .*b .*a, "):
        resumed("--data", "../moved/b", "../moved/a")


def test_a_run_without_its_listing(resumed: Resume, tmp_path: Path) -> None:
    (tmp_path / "run" / LISTING).unlink()
    with pytest.raises(UsageError, match=r"corpus\.jsonl, which names the files .* is gone"):
        resumed()
