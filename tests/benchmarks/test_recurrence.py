import json
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import recurrence as benchmark
from pallas_kernels import target


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{answer}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_numbers_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers.json"
    arguments = ["--shape", "2,8,3,4", "--implementation", "scan", "--repetitions", "2"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    assert numbers["implementation"] == "scan"
    (shape,) = numbers["shapes"]
    assert shape["elements"] == 2 * 8 * 3 * 4 * 4
    passes = shape["passes"]
    assert list(passes) == ["forward", "backward", "forward+backward"]
    both = passes["forward"]["ms"] + passes["backward"]["ms"]
    assert passes["forward+backward"]["ms"] == pytest.approx(both, abs=1e-5)
    for pass_ in passes.values():
        assert pass_["tokens_per_second"] == pytest.approx(2 * 8 / pass_["ms"] * 1e3, rel=1e-3)
    _, header, forward, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("shape")
    assert forward.split()[:7] == [
        *("2,8,3,4", "2", "8", "3", "4", "forward"),
        f"{passes['forward']['ms']:.3f}",
    ]


def test_what_cannot_be_timed_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise NotImplementedError("not here")

    monkeypatch.setitem(benchmark.main.__globals__, "e88_recurrence", refuse)
    assert benchmark.main(["--shape", "1,2,1,4"]) == 1
    assert "1,2,1,4: not here" in capsys.readouterr().err


def test_a_pass_that_compiles_is_timed_though_the_other_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @jax.custom_vjp
    def no_gradient(q: Any) -> Any:
        return q

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("no gradient")

    no_gradient.defvjp(lambda q: (q, None), refuse)
    monkeypatch.setitem(
        benchmark.main.__globals__,
        "e88_recurrence",
        lambda q, **_: (no_gradient(q), None),
    )
    path = tmp_path / "numbers.json"
    arguments = ["--shape", "1,2,1,4", "--no-scan", "--repetitions", "1"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 1
    numbers = json.loads(path.read_text())
    assert numbers["commit"]
    (shape,) = numbers["shapes"]
    assert list(shape["passes"]) == ["forward"]
    assert shape["error"] == "no gradient"


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        ("", [("cpu", None, True)]),
        ("--async-copies", [("cpu", (8, 0), False)]),
        (
            "--as-gpu rtx4090 b200",
            [("GeForce RTX 4090", (8, 9), False), ("B200", (10, 0), True)],
        ),
        ("--as-gpu b200 --async-copies", [("B200", (8, 0), False)]),
    ],
)
def test_kernels_as_another_gpu_takes_them(
    flags: str, seen: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        built_for = target.current()
        found.append((built_for.name, built_for.compute_capability, built_for.has_bulk_copies))
        assert built_for.n_sms is None  # as the device at hand
        raise NotImplementedError("not here")

    found: list[Any] = []
    monkeypatch.setitem(benchmark.main.__globals__, "e88_recurrence", refuse)
    assert benchmark.main(["--shape", "1,2,1,4", "--no-scan", *flags.split()]) == 1
    assert sorted(found, key=str) == sorted(seen, key=str)


def test_an_unknown_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--as-gpu", "rtx1"])
    assert "invalid choice: 'rtx1'" in capsys.readouterr().err


def test_the_tanh_limit() -> None:
    """Shape A on an H100 at 1980 MHz: 1.2e9 tanhs by 132 SMs, 16 per cycle each, take 0.29 ms."""
    passes = {
        name: {"ms": 1.0, "clock_mhz": 1980.0}
        for name in ("forward", "backward", "forward+backward")
    }
    benchmark.add_rates(benchmark.NAMED["A"], passes, sm_count=132)
    limits = {name: numbers["tanh_limit_ms"] for name, numbers in passes.items()}
    assert limits["forward"] == limits["backward"] == pytest.approx(0.289, abs=5e-4)
    assert limits["forward+backward"] == pytest.approx(2 * limits["forward"], abs=2e-6)
    assert passes["backward"]["times_tanh_limit"] == pytest.approx(3.46, abs=5e-3)


def test_the_sweep_keeps_the_number_of_elements() -> None:
    assert list(benchmark.SWEEP) == [16, 32, 48, 64, 72, 96, 128]
    for shape in benchmark.SWEEP.values():
        assert shape.elements == pytest.approx(benchmark.NAMED["A"].elements, rel=0.12)


@pytest.mark.parametrize(
    ("answer", "clock"), [("echo 1755", 1755), ("echo '[N/A]'", None), ("exit 9", None)]
)
def test_the_clock_is_read_while_timing(
    answer: str,
    clock: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, answer)
    with benchmark.ClockSampler() as sampler:
        began = time.perf_counter()
        time.sleep(0.3)
        ended = time.perf_counter()
    assert sampler.median_mhz(began, ended) == clock
    assert sampler.median_mhz(ended + 60, ended + 61) is None


def test_the_clock_is_read_on_after_an_answer_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped gets none in time: all that it timed since had no clock."""
    lines = [
        f"cd {tmp_path}",
        "[ -e first ] || { : >first; echo 1980; exit; }",
        "[ -e failed ] || { : >failed; exit 9; }",
        "echo 1755",
    ]
    fake_nvidia_smi(tmp_path, monkeypatch, "\n".join(lines))
    with benchmark.ClockSampler() as sampler:
        began = time.perf_counter()
        time.sleep(0.4)
    assert (tmp_path / "failed").exists()
    assert sampler.median_mhz(began, time.perf_counter()) == 1755


def test_no_nvidia_smi_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with benchmark.ClockSampler() as sampler:
        assert sampler.query("driver_version") is None


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "1,2,0,4"])
def test_bad_shapes_are_one_sentence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--shape", text])
    assert text in capsys.readouterr().err.splitlines()[-1]
