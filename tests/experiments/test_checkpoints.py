"""Checkpoints: what is kept, what is restored, and what happens when files are cut short."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from harness.checkpoints import Checkpoints
from harness.errors import UsageError

# Orbax leaves coroutines behind when arrays on disk are cut short.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_what_orbax_left() -> Iterator[None]:
    yield
    gc.collect()


def state_of(step: int) -> dict[str, object]:
    key = jax.random.key(step)
    return {"weights": jax.random.normal(key, (64, 65)), "nested": (jnp.int32(step), None)}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Checkpoints]:
    """Opens checkpoints in which steps are saved with the given bits per byte."""

    def save(steps: dict[int, float | None], keep: int | None = 2) -> Checkpoints:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=keep)
        for step, bits in steps.items():
            checkpoints.save(step, state_of(step), {"data": {"next_index": step}}, bits)
        checkpoints.close()
        return Checkpoints(tmp_path / "checkpoints", keep=keep)

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


def test_best_without_any_evaluation_is_the_newest(saved: Callable[..., Checkpoints]):
    assert_restores(saved({1: None, 2: None}), 2, best=True)


def test_nothing_to_restore(saved: Callable[..., Checkpoints]):
    assert saved({}).restore_latest(state_of(0)) is None


def cut(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(0 if how == "empty" else size // 2)


@pytest.mark.parametrize("how", ["half", "empty", "missing"])
def test_a_checkpoint_cut_short_is_passed_over(
    saved: Callable[..., Checkpoints], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
):
    """Whichever file is cut, restoring gives the right values of that step or of the one before."""
    saved({1: None, 2: None}).close()
    pristine = tmp_path / "checkpoints"
    files = [path.relative_to(pristine) for path in (pristine / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    passed_over = 0
    for n, file in enumerate(sorted(files)):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(pristine, copy)
        cut(copy / file, how)
        checkpoints = Checkpoints(copy, keep=2)
        restored = checkpoints.restore_latest(jax.eval_shape(lambda: state_of(0)))
        assert restored is not None
        chex.assert_trees_all_equal(restored[1], state_of(restored[0]))
        if restored[0] == 1:
            passed_over += 1
            (warning,) = capsys.readouterr().err.splitlines()[-1:]
            assert "checkpoint 2 cannot be read" in warning
            assert (copy / "unreadable" / "2").is_dir()
            checkpoints.save(2, state_of(2), {"data": {"next_index": 2}}, None)
            checkpoints.close()
            assert_restores(Checkpoints(copy, keep=2), 2)
        else:
            checkpoints.close()
    assert passed_over >= 4


def test_evaluations_cut_short(
    saved: Callable[..., Checkpoints], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved({1: 5.0, 2: 3.0}).close()
    cut(tmp_path / "checkpoints" / "2" / "metrics" / "metrics", "half")
    assert_restores(saved({}), 1)
    assert "checkpoint 2 cannot be read" in capsys.readouterr().err


def test_a_reader_moves_nothing(
    saved: Callable[..., Checkpoints], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved({1: 3.0, 2: 4.0}).close()
    cut(tmp_path / "checkpoints" / "2" / "state" / "_METADATA", "half")
    assert_restores(saved({}, keep=None), 1)
    assert kept(tmp_path) == [1, 2]
    assert "checkpoint 2 cannot be read" in capsys.readouterr().err


def test_nothing_readable_is_an_error_that_moves_nothing(
    saved: Callable[..., Checkpoints], tmp_path: Path
):
    checkpoints = saved({1: None, 2: None})
    other = {"weights": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    with pytest.raises(UsageError, match=r"none of the 2 checkpoints .* step 2: "):
        checkpoints.restore_latest(other)
    assert kept(tmp_path) == [1, 2]


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
    assert not partial.exists()
