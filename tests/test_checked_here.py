import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from e88_jax import checked_here, implementations, kernels, selfcheck
from e88_jax.mixers.base import Implementation
from e88_jax.selfcheck import Case, Result
from pallas_kernels import target

B200 = dataclasses.replace(target.H100, name="NVIDIA B200", compute_capability=(10, 0))
CASE = Case((1, 1, 1, 4, 4), "float32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for asked in (checked_here.suggest, kernels.log_once):
        asked.cache_clear()
    return tmp_path


def warnings_of_a_call(
    caplog: pytest.LogCaptureFixture,
    on: target.Target,
    named: Implementation | None = None,
) -> list[str]:
    """The log of an op that a kernel computes."""
    caplog.clear()
    checked_here.suggest.cache_clear()
    by_name: Any = {"mosaic_gpu": lambda: "done", "scan": lambda: "slow"}
    with target.use(on), caplog.at_level(logging.WARNING):
        for _ in range(2):
            fastest = ("mosaic_gpu", "scan")
            assert implementations.run("an op", by_name, named, fastest) == "done"
    return caplog.messages


def test_a_gpu_on_which_nothing_has_run(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of_a_call(caplog, B200)
    assert "compiled for NVIDIA B200 (10.0), not run" in warning
    assert "`python -m e88_jax.selfcheck`" in warning


def test_no_warning_where_tests_have_run_or_a_kernel_is_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert warnings_of_a_call(caplog, target.H100) == []
    assert warnings_of_a_call(caplog, B200, "mosaic_gpu") == []


def check(
    monkeypatch: pytest.MonkeyPatch, results: list[Result], *flags: str, on: target.Target = B200
) -> int:
    monkeypatch.setattr(selfcheck, "run_checks", lambda *_: results)
    with target.use(on):
        return selfcheck.main(flags)


def test_a_check_that_passes_ends_the_warnings(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert check(monkeypatch, [Result("mosaic_gpu", CASE)]) == 0
    out = capsys.readouterr().out
    assert "not run. This runs them." in out
    assert "have been run here" in out
    assert warnings_of_a_call(caplog, B200) == []
    other = dataclasses.replace(B200, name="NVIDIA B300", compute_capability=(10, 3))
    assert len(warnings_of_a_call(caplog, other)) == 1
    monkeypatch.setattr("jax.__version__", "99.0")
    kernels.log_once.cache_clear()
    assert len(warnings_of_a_call(caplog, B200)) == 1


@pytest.mark.parametrize(
    ("results", "flags"),
    [
        ([Result("mosaic_gpu", CASE, failures=("NaN",)), Result("scan", CASE)], ()),
        ([Result("mosaic_gpu", CASE, refusal="needs more"), Result("scan", CASE)], ()),
        ([Result("mosaic_gpu", CASE)], ("--quick",)),
    ],
    ids=["fails", "kernels not checked", "a few cases"],
)
def test_a_check_that_says_too_little(
    results: list[Result],
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    check(monkeypatch, results, *flags)
    assert list(cache.iterdir()) == []


def test_nothing_is_noted_of_a_gpu_on_which_tests_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert check(monkeypatch, [Result("mosaic_gpu", CASE)], on=target.H100) == 0
    assert "not run" not in capsys.readouterr().out
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_or_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    cache: Path,
) -> None:
    (cache / "e88_jax").write_text("a file where a folder should be")
    assert check(monkeypatch, [Result("mosaic_gpu", CASE)]) == 0
    assert "Not noted in" in capsys.readouterr().out
    assert len(warnings_of_a_call(caplog, B200)) == 1


def test_jax_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = dataclasses.replace(target.H100, name="NVIDIA A100", compute_capability=(8, 0))
    monkeypatch.setattr(target.metadata, "version", lambda _: "0.10.2")
    assert target.jax_refusal(a100) == "needs JAX 0.11 or later on NVIDIA A100, got 0.10.2"
    assert target.jax_refusal(target.H100) is None
    monkeypatch.setattr(target.metadata, "version", lambda _: "0.11.0")
    assert target.jax_refusal(a100) is None
