"""The directory of a run: claimed by one process, described, read again."""

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.errors import UsageError
from experiments.harness import run_directory
from experiments.tasks.base import Metric
from experiments.tasks.bytes import ByteLMConfig

DESCRIPTION = run_directory.Description(
    ByteLMConfig(),
    fingerprint="abc",
    data="1,000 bytes",
    metric={"name": "bits_per_byte", "unit": "bits per byte", "better": "lower"},
    parameters=10,
    devices="1 x abacus",
)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Path:
    directory = Path("run")
    directory.mkdir()
    run_directory.describe(directory, DESCRIPTION, resumed_at=None)
    return directory


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "now"))
    with (
        run_directory.claim(None, "byte-lm") as first,
        run_directory.claim(None, "byte-lm") as second,
        run_directory.claim(None, "study") as third,
    ):
        names = [path.name for path in (first, second, third)]
        assert names == ["byte-lm-now", "byte-lm-now-2", "study-now"]
        (second / "run.json").touch()
    assert list(Path("runs").rglob("*")) == [second, second / "run.json"]


def test_a_directory_is_claimed_once():
    with (
        run_directory.claim(Path("a/b"), "x") as directory,
        pytest.raises(UsageError, match=r"a/b is in use by process \d+ on host"),
        run_directory.claim(directory, "x"),
    ):
        pass
    assert not Path("a").exists()
    Path("a").mkdir()
    with run_directory.claim(Path("a"), "x"):
        pass
    assert Path("a").exists()


def test_a_directory_that_may_not_be_written_is_refused_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may
    with pytest.raises(UsageError, match=r"--out a/b cannot be written: \S+ does not allow it"):
        run_directory.check_claimable(Path("a/b"))
    assert not Path("a").exists()


def test_a_run_that_another_process_has_just_finished_there_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    @contextlib.contextmanager
    def owned_after_it(directory: Path) -> Iterator[Path]:
        (directory / "run.json").touch()
        yield directory

    monkeypatch.setattr(run_directory, "owned", owned_after_it)
    with pytest.raises(UsageError, match="already holds"), run_directory.claim(Path("a"), "x"):
        pass


def test_what_a_process_left_that_was_killed_at_once_can_be_claimed():
    Path("a").mkdir()
    Path("a/lock").touch()
    Path("a/run.json.partial").touch()
    with run_directory.claim(Path("a"), "x") as directory:
        run_directory.describe(directory, DESCRIPTION, resumed_at=None)
    assert sorted(path.name for path in Path("a").iterdir()) == ["run.json"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("run.json", "a already holds a run"), ("notes", "--out a is not empty"), (None, "a file")],
)
def test_what_cannot_be_claimed_stays_as_it_is(name: str | None, sentence: str):
    if name is None:
        Path("a").touch()
    else:
        Path("a").mkdir()
        Path("a", name).touch()
    before = sorted(Path().rglob("*")), Path("a").stat().st_mtime_ns
    with pytest.raises(UsageError, match=sentence), run_directory.claim(Path("a"), "x"):
        pass
    assert (sorted(Path().rglob("*")), Path("a").stat().st_mtime_ns) == before


def test_a_run_is_described_again_where_it_goes_on(run: Path):
    assert run_directory.load_config(run, ByteLMConfig) == dataclasses.replace(
        ByteLMConfig(), out=run
    )
    run_directory.check_continues(run, DESCRIPTION)
    run_directory.describe(run, DESCRIPTION, resumed_at=7)
    run_directory.describe(run, DESCRIPTION, resumed_at=9)
    described = json.loads((run / "run.json").read_text())
    assert [here["step"] for here in described["resumed"]] == [7, 9]
    assert not (run / "run.json.partial").exists()


def rewrite(run: Path, change: Callable[[Any], Any]) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def refusal(run: Path) -> str:
    try:
        run_directory.load_config(run, ByteLMConfig)
        run_directory.check_continues(run, DESCRIPTION)
    except UsageError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("key", ["config", "fingerprint", "data", "metric", "devices", "versions"])
def test_a_key_missing_or_of_another_type_is_one_sentence(run: Path, key: str):
    whole = (run / "run.json").read_text()
    rewrite(run, lambda values: {name: values[name] for name in values if name != key})
    assert refusal(run) == f"run/run.json lacks '{key}'."
    for wrong in (None, 1.5, True, [1], "" if key in ("config", "metric", "versions") else {}):
        (run / "run.json").write_text(whole)
        rewrite(run, lambda values, wrong=wrong: {**values, key: wrong})
        assert refusal(run).startswith(f"'{key}' in run/run.json must be a")


def test_the_metric_of_a_run(run: Path):
    assert run_directory.load_metric(run) == Metric("bits_per_byte", "bits per byte", "lower")
    for wrong in ({"name": 3}, {"better": "most"}, {"better": ["lower"]}, {"unit": None}):
        rewrite(run, lambda x, wrong=wrong: {**x, "metric": {**DESCRIPTION.metric, **wrong}})
        with pytest.raises(UsageError, match=r"'metric' in run/run\.json must have a name, a unit"):
            run_directory.load_metric(run)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[" * 100_000])
def test_what_is_not_json_is_one_sentence(run: Path, content: str):
    (run / "run.json").write_bytes(content.encode("latin-1"))
    assert refusal(run) == "run/run.json is not valid JSON."


@pytest.mark.parametrize("content", ["[]", "null", '"run"', "3"])
def test_what_is_no_object_is_one_sentence(run: Path, content: str):
    (run / "run.json").write_text(content)
    assert refusal(run) == f"run/run.json must hold an object, not {content}."


@pytest.mark.parametrize(
    "change",
    [
        lambda config: {},
        lambda config: {**config, "task": []},
        lambda config: {**config, "task": {**config["task"], "data": 3}},
        lambda config: {**config, "model": "small"},
        lambda config: {**config, "optimizer": None},
        lambda config: {**config, "steps": "600"},
        lambda config: {**config, "out": 5},
        lambda config: {**config, "invented_later": 1},
        lambda config: {key: value for key, value in config.items() if key != "model"},
    ],
)
def test_a_config_that_is_none_is_one_sentence(run: Path, change: Callable[[Any], Any]):
    rewrite(run, lambda values: {**values, "config": change(values["config"])})
    assert refusal(run).startswith("the config in run/run.json is none that this version knows: ")


def test_a_disk_that_is_full_leaves_the_file_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = (run / "run.json").read_bytes()

    def is_full(path: Path, _: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # names no file

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", is_full)
        with pytest.raises(UsageError, match=r"run/run.json cannot be written: No space left"):
            run_directory.describe(run, DESCRIPTION, resumed_at=3)
    assert [path.name for path in run.iterdir()] == ["run.json"]
    assert (run / "run.json").read_bytes() == before


def test_what_a_run_can_do_without_is_a_warning(capsys: pytest.CaptureFixture[str]):
    with run_directory.optional(Path("loss.png")), open("/dev/full", "wb", 0) as file:
        file.write(b"x")
    with run_directory.optional(Path("loss.png")):
        raise ValueError("no such colour")
    first, second = capsys.readouterr().err.splitlines()
    assert "loss.png could not be written (No space left on device)" in first
    assert "loss.png could not be written (no such colour)" in second


def test_tensorboard_needs_a_path_in_utf_8(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"run\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        run_directory.check_claimable(out)
    assert not out.exists()
