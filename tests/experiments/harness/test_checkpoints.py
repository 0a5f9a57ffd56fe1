"""Checkpoints: what is kept, what is restored, and what happens when files are damaged."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments.cli.errors import RunStopped, UsageError
from experiments.harness.checkpoints import CHECKSUMS, Checkpoints
from experiments.tasks.base import Metric

BITS = Metric("bits_per_byte", "bits per byte", "lower")


def state_of(step: int) -> dict[str, object]:
    key = jax.random.key(step)
    return {"weights": jax.random.normal(key, (64, 65)), "nested": (jnp.int32(step), None)}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Checkpoints]:
    """Opens checkpoints in which steps are saved with the given bits per byte."""

    def save(steps: dict[int, float | None], keep: int | None = 2) -> Checkpoints:
        checkpoints = Checkpoints(tmp_path / "checkpoints", BITS, keep=keep)
        for step, bits in steps.items():
            checkpoints.save(step, state_of(step), {"data": {"next_index": step}}, bits)
        checkpoints.close()
        return Checkpoints(tmp_path / "checkpoints", BITS, keep=keep)

    return save


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*"))


def assert_restores(checkpoints: Checkpoints, step: int, *, best: bool = False) -> None:
    like = jax.eval_shape(lambda: state_of(0))
    restored = checkpoints.restore_best(like) if best else checkpoints.restore_latest(like)
    assert restored is not None
    assert restored[0] == step
    chex.assert_trees_all_equal(restored[1], state_of(step))
    assert restored[2] == {"data": {"next_index": step}}


def test_keeps_the_newest_and_the_best(saved: Callable[..., Checkpoints], tmp_path: Path):
    checkpoints = saved({1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: float("nan"), 6: None})
    assert kept(tmp_path) == [2, 5, 6]
    assert_restores(checkpoints, 6)
    assert_restores(checkpoints, 2, best=True)


def test_the_best_is_the_highest_of_a_metric_that_is_better_higher(tmp_path: Path):
    accuracy = Metric("accuracy", "of targets", "higher")
    checkpoints = Checkpoints(tmp_path / "checkpoints", accuracy, keep=1)
    for step, value in {1: 0.25, 2: 0.75, 3: 0.5, 4: float("nan")}.items():
        checkpoints.save(step, state_of(step), {"data": {"next_index": step}}, value)
        assert checkpoints.best == (0.25 if step == 1 else 0.75)
    checkpoints.close()
    assert kept(tmp_path) == [2, 4]
    reader = Checkpoints(tmp_path / "checkpoints", accuracy, keep=None)
    assert reader.best == 0.75
    assert_restores(reader, 2, best=True)


def test_best_without_any_evaluation_is_the_newest(saved: Callable[..., Checkpoints]):
    assert_restores(saved({1: None, 2: None}), 2, best=True)


def test_nothing_to_restore(saved: Callable[..., Checkpoints]):
    assert saved({}).restore_latest(state_of(0)) is None


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        pieces = {"half": content[: len(content) // 2], "empty": b"", "longer": content + b"x"}
        path.write_bytes(pieces[how])


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def files_of(checkpoint: Path) -> list[Path]:
    """Without the empty markers of items that are complete."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path.relative_to(checkpoint) for path in files if path.stat().st_size]


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, not to be written to."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    checkpoints = Checkpoints(directory, BITS, keep=2)
    for step, bits in ((1, 3.0), (2, 2.0)):
        checkpoints.save(step, state_of(step), {"data": {"next_index": step}}, bits)
    checkpoints.close()
    return directory


def assert_passes_over_damage(
    directory: Path, capsys: pytest.CaptureFixture[str], what: str = "is not as it was written"
) -> bool:
    """Whether the older checkpoint is taken, as the newer was found to be damaged."""
    checkpoints = Checkpoints(directory, BITS, keep=2)
    restored = checkpoints.restore_latest(jax.eval_shape(lambda: state_of(0)))
    checkpoints.close()
    warnings = capsys.readouterr().err
    assert restored is not None
    chex.assert_trees_all_equal(restored[1], state_of(restored[0]))
    assert restored[2] == {"data": {"next_index": restored[0]}}
    if restored[0] == 2:
        return False
    assert re.search(rf"checkpoint 2 is damaged: .+ {what}; it is now ", warnings)
    assert (directory / "unreadable" / "2").is_dir()
    return True


@pytest.mark.parametrize("how", ["half", "empty", "missing", "longer"])
def test_a_damaged_checkpoint_is_passed_over(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
):
    """Whichever file is cut, restoring gives the right values of that step or of the one before."""
    names = files_of(two_saved / "2")
    assert len(names) > 8
    taken = set()
    for n, name in enumerate(names):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(two_saved, copy)
        damage(copy / "2" / name, how)
        what = "is missing" if how == "missing" else "is not as it was written"
        if not assert_passes_over_damage(copy, capsys, what):
            taken.add(str(name))
    # Orbax's description of the step is not read; without checksums, nothing is known of damage.
    unread = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert taken == (unread | {CHECKSUMS} if how == "missing" else unread)


def test_a_flipped_bit_is_noticed(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rng = random.Random(0)
    passed_over = 0
    for n in range(36):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(two_saved, copy)
        names = files_of(copy / "2")
        flip_a_bit(copy / "2" / names[n % len(names)], rng)
        what = "is (missing|not as it was written)"  # a file's name in the checksums is another
        passed_over += assert_passes_over_damage(copy, capsys, what)
    assert passed_over > 24


def test_a_checkpoint_can_be_saved_again_where_a_damaged_one_was(two_saved: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    for _ in range(2):
        damage(copy / "2" / "state" / "manifest.ocdbt", "half")
        checkpoints = Checkpoints(copy, BITS, keep=2)
        assert_restores(checkpoints, 1)
        checkpoints.save(2, state_of(2), {"data": {"next_index": 2}}, None)
        checkpoints.close()
    assert_restores(Checkpoints(copy, BITS, keep=2), 2)
    assert sorted(path.name for path in (copy / "unreadable").iterdir()) == ["2", "2.1"]


def test_a_step_is_saved_once(two_saved: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    checkpoints = Checkpoints(copy, BITS, keep=2)
    checkpoints.save(2, state_of(7), {"data": {"next_index": 7}}, None)
    checkpoints.close()
    assert_restores(Checkpoints(copy, BITS, keep=2), 2)


def test_what_orbax_says_of_a_step_is_not_needed(two_saved: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    for step in (1, 2):
        (copy / f"{step}" / "_CHECKPOINT_METADATA").write_bytes(b"\xff{")
    checkpoints = Checkpoints(copy, BITS, keep=2)
    assert_restores(checkpoints, 2)
    checkpoints.save(3, state_of(3), {"data": {"next_index": 3}}, None)
    checkpoints.close()
    assert_restores(Checkpoints(copy, BITS, keep=2), 3)


def test_a_checkpoint_without_checksums_is_restored_with_a_warning(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    (copy / "2" / CHECKSUMS).unlink()
    assert_restores(Checkpoints(copy, BITS, keep=2), 2)
    assert f"checkpoint 2 has no {CHECKSUMS}" in capsys.readouterr().err
    damage(copy / "2" / "state" / "_METADATA", "half")
    with pytest.raises(UsageError, match=r"checkpoint 2 .* is unchecked, and cannot be restored"):
        Checkpoints(copy, BITS, keep=2).restore_latest(state_of(0))
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        MemoryError(),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_damaged(
    two_saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    checkpoints = Checkpoints(copy, BITS, keep=2)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(hashlib, "file_digest", fails)
    reason = error.strerror if isinstance(error, OSError) else "MemoryError"
    for restore in (checkpoints.restore_latest, checkpoints.restore_best):
        with pytest.raises(UsageError, match=rf"2/\S+ cannot be read \({reason}\)"):
            restore(state_of(0))
    with pytest.raises(UsageError, match=rf"/metrics cannot be read \({reason}\)"):
        Checkpoints(copy, BITS, keep=2)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_damaged_evaluation_counts_no_more(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    metrics = copy / "1" / "metrics" / "metrics"
    metrics.write_text(metrics.read_text().replace("3", "1"))  # now the best
    assert_restores(Checkpoints(copy, BITS, keep=None), 2, best=True)
    assert "checkpoint 1 is damaged: metrics/metrics" in capsys.readouterr().err
    assert_restores(Checkpoints(copy, BITS, keep=2), 2, best=True)
    assert (copy / "unreadable" / "1").is_dir()


def test_what_is_left_of_a_checkpoint_that_was_being_deleted_is_no_matter(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    shutil.rmtree(copy / "1" / "metrics")
    (copy / "0").mkdir()
    (copy / "3").touch()
    (copy / "04").mkdir()
    checkpoints = Checkpoints(copy, BITS, keep=2)
    assert_restores(checkpoints, 2, best=True)
    assert capsys.readouterr().err == ""
    checkpoints.save(5, state_of(5), {"data": {"next_index": 5}}, None)
    checkpoints.close()
    assert sorted(path.name for path in copy.iterdir()) == ["04", "2", "3", "5"]


def test_the_best_is_passed_over_where_it_is_damaged(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    flip_a_bit(copy / "2" / "meta" / "metadata", random.Random(0))
    assert_restores(Checkpoints(copy, BITS, keep=None), 1, best=True)
    assert "the best checkpoint, 2, is damaged: meta/metadata" in capsys.readouterr().err


def test_a_reader_moves_nothing_and_cleans_nothing(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    damage(copy / "2" / "state" / "_METADATA", "half")
    being_written = copy / "3.orbax-checkpoint-tmp" / "state"
    being_written.mkdir(parents=True)
    (being_written / "part").touch()
    before = sorted(copy.rglob("*"))
    reader = Checkpoints(copy, BITS, keep=None)
    assert_restores(reader, 1)
    reader.close()
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join(timeout=0.2)
    assert sorted(copy.rglob("*")) == before
    assert "checkpoint 2 is damaged: state/_METADATA" in capsys.readouterr().err


def test_a_checkpoint_of_another_structure_is_an_error_that_moves_nothing(
    two_saved: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    other = {"weights": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    with pytest.raises(UsageError, match=r"checkpoint 2 .* is whole, but cannot be restored"):
        Checkpoints(copy, BITS, keep=2).restore_latest(other)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_nothing_whole_is_an_error_that_moves_nothing(two_saved: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    for step in (1, 2):
        damage(copy / f"{step}" / "state" / "_METADATA", "longer")
    with pytest.raises(UsageError, match=r"none of the 2 checkpoints .* step 2, state/_METADATA "):
        Checkpoints(copy, BITS, keep=2).restore_latest(state_of(0))
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def check_for_a_while(checkpoints: Checkpoints) -> None:
    """As training does at each record."""
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)


def test_a_disk_that_is_full_stops_the_run(
    two_saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    checkpoints = Checkpoints(copy, BITS, keep=2)
    sentence = r"step 3 could not be written to \S+ \(No space left .*that of step 2 is safe"

    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", is_full)
        checkpoints.save(3, state_of(3), {}, None)
        with pytest.raises(RunStopped, match=sentence) as stopped:
            check_for_a_while(checkpoints)
    assert stopped.value.exit_code == 1
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]
    checkpoints.save(3, state_of(3), {"data": {"next_index": 3}}, None)
    checkpoints.close()
    assert_restores(Checkpoints(copy, BITS, keep=2), 3)


def test_an_interrupted_save_with_metrics_cut_short(
    saved: Callable[..., Checkpoints], tmp_path: Path
):
    saved({1: 3.0}).close()
    metrics = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "metrics" / "metrics"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"bits')
    assert_restores(saved({}), 1)


def test_interrupted_save_is_ignored(saved: Callable[..., Checkpoints], tmp_path: Path):
    saved({1: None}).close()
    partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "meta").write_text(json.dumps({}))
    assert_restores(saved({}), 1)
    assert_restores(saved({3: None}), 3)
    assert not partial.exists()
