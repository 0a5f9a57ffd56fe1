"""Records that a run writes about itself, and reads when it goes on."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.harness.metrics import Interval, MetricsLog, plot_metric, read_metrics
from experiments.harness.step import StepMetrics
from experiments.tasks.bytes import BITS_PER_BYTE


def shown(directory: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Steps and values that TensorBoard shows."""
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)]


def write_steps(log: MetricsLog, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        log.write("train", step, loss=scale * step)


@contextlib.contextmanager
def opened(directory: Path, start: int) -> Iterator[MetricsLog]:
    with contextlib.closing(MetricsLog(directory, start=start)) as log:
        yield log


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path):
    with contextlib.ExitStack() as still_open:
        log = still_open.enter_context(opened(tmp_path, start=0))
        write_steps(log, range(1, 9))
        for start in (5, 3):  # killed again before it had got as far
            log = still_open.enter_context(opened(tmp_path, start=start))
            write_steps(log, range(start + 1, 12), scale=2.0)
        expected = [(step, step * (1.0 if step <= 3 else 2.0)) for step in range(1, 12)]
        assert shown(tmp_path) == expected
        records = read_metrics(tmp_path / "metrics.jsonl")
        assert [(record["step"], record["loss"]) for record in records] == expected


def test_a_resumed_run_keeps_the_times_of_its_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for start, now in ((0, 1000.0), (2, 2000.0), (4, 3000.0)):
        monkeypatch.setattr("experiments.harness.metrics.time.time", lambda now=now: now)
        with opened(tmp_path, start=start) as log:
            write_steps(log, range(start + 1, start + 4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    times = [(event.step, event.wall_time) for event in events.Tensors("train/loss")]
    assert times == [(n, 1000.0 if n <= 2 else 2000.0 if n <= 4 else 3000.0) for n in range(1, 8)]


def test_what_is_not_finite_is_left_out(tmp_path: Path):
    with opened(tmp_path, start=0) as log:
        log.write("train", 1, loss=math.nan, grad_norm=math.inf, skipped=3)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "skipped": 3}]


def test_an_event_is_on_disk_at_once_and_one_cut_short_ends_its_file_only(tmp_path: Path):
    with opened(tmp_path, start=0) as log:
        write_steps(log, range(1, 6))
        assert shown(tmp_path)[-1] == (5, 5.0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - 3)
    with opened(tmp_path, start=4) as log:
        write_steps(log, range(5, 8))
    assert [step for step, _ in shown(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


BAD_LINES = [
    b'{"kind": "train", "st',
    b"\xff\xfe",
    b"",
    b"[1]",
    b"null",
    b'{"kind": "train"}',
    b'{"step": 3}',
    b'{"kind": "train", "step": "3"}',
    b'{"kind": "train", "step": true}',
    b'{"kind": 1, "step": 3}',
    b'{"kind": "train", "step": 3, "loss": "low"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_lost_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes):
    good = [json.dumps({"kind": "train", "step": n, "loss": 1.0}).encode() for n in range(15)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*good[:6], bad, *good[7:], b'{"kind": "tr']))
    assert [r["step"] for r in read_metrics(path)] == [n for n in range(15) if n != 6]
    assert capsys.readouterr().err == f"warning: {path}: line 7 is not a record, and left out.\n"
    plot_metric(tmp_path, BITS_PER_BYTE)
    MetricsLog(tmp_path, start=14).close()
    capsys.readouterr()
    assert [r["step"] for r in read_metrics(path)] == [n for n in range(15) if n != 6]
    assert capsys.readouterr().err == ""


def test_lines_are_read_with_and_without_the_last_end_of_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    record = {"kind": "train", "step": 1}
    for end in ("", "\n"):
        path.write_text(f"{json.dumps(record)}\n{json.dumps(record)}{end}")
        assert read_metrics(path) == [record, record]


class FullDisk:
    """A file on a disk with room for some bytes, and more later."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = min(len(data), self.room)
        self.room -= n
        return self.file.write(data[:n])

    def close(self) -> None:
        self.file.close()


def test_a_disk_that_is_full_delays_records_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = MetricsLog(tmp_path, start=0)
    disk = FullDisk(log._file, room=50)
    log._file = disk  # pyright: ignore[reportAttributeAccessIssue]
    write_steps(log, range(1, 5))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl cannot be written (No space left on device)" in warning
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    disk.room = 1000
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_tensorboard_that_fails_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path, start=0) as log:
        monkeypatch.setattr("experiments.harness.metrics.RecordWriter.write", is_full)
        write_steps(log, range(1, 5))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "tensorboard could not be written (No space left on device)" in warning
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_tensorboard_is_not_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").touch()
    log = MetricsLog(tmp_path, start=0)
    write_steps(log, range(1, 3))
    log.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "tensorboard could not be written (File exists)" in warning
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def step_of(loss: Any, grad_norm: Any, score: Any = None) -> StepMetrics:
    nothing: Any = np.float32(0)
    return StepMetrics(loss, grad_norm, nothing, nothing, nothing, score)


def test_an_interval_goes_on_from_its_sums():
    rng = np.random.default_rng(0)
    steps = [step_of(*rng.standard_normal(2, np.float32)) for _ in range(50)]
    steps[3] = step_of(np.float32("nan"), np.float32(1))
    steps[30] = step_of(np.float32(1), np.float32("inf"))
    whole = Interval()
    whole.add(steps)
    for cut in (0, 1, 4, 31, 49):
        first = Interval()
        first.add(steps[:cut])
        resumed = Interval(**json.loads(json.dumps(first.sums())))
        resumed.add(steps[cut:])
        assert resumed.means() == whole.means()
    pairs = np.asarray([step[:2] for step in steps], np.float64)
    finite = pairs[np.isfinite(pairs).all(axis=1)]
    np.testing.assert_allclose(list(whole.means().values()), finite.mean(0), rtol=1e-14)
    assert Interval().means() == {}
    scored = Interval()
    scored.add([step_of(1.0, 2.0, x) for x in (0.5, 0.75)])
    assert scored.means() == {"loss": 1, "grad_norm": 2, "score": 0.625}


VALIDATION = '{"kind": "validation", "step": 1, "bits_per_byte": 2.5}\n'


def test_a_plot_in_place_of_the_one_before(tmp_path: Path) -> None:
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text(VALIDATION)
    image.write_text("before")
    plot_metric(tmp_path, BITS_PER_BYTE)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [image, metrics]


def test_a_plot_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(VALIDATION)
    (tmp_path / "loss.png.partial").symlink_to("/dev/full")
    plot_metric(tmp_path, BITS_PER_BYTE)
    assert "loss.png is not drawn: [Errno 28] No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [metrics]
