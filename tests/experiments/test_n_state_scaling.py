"""The program that times the layer against n_state, on sizes that compile fast."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from matplotlib.image import imread

from benchmarks.measure import layer_step, recurrence_timing, timing
from e88_jax.recurrence import e88_recurrence
from experiments import cli, n_state_scaling
from experiments.scaling import measure as scaling
from experiments.scaling import report as scaling_report
from pallas_kernels import target
from tests.reference.configs import lm_config

TINY = ["--d-inner", "16", "--batch-size", "1", "--seq-len", "2", "--repetitions", "2"]
REFUSED = 12


def refusing(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """`function`, but `error` for an n_state of 12."""

    def refuse(*args: Any, **arrays: Any) -> Any:
        n_state = args[0].layers[0].n_state if args else arrays["q"].shape[-1]
        if n_state == REFUSED:
            raise error
        return function(*args, **arrays)

    return refuse


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run over 4, 8 and 12 that had to do without 12."""
    directory = tmp_path_factory.mktemp("run") / "out"
    refused = NotImplementedError("12 is\ntoo odd")
    no_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(scaling, "e88_recurrence", refusing(e88_recurrence, refused))
        make_layer_step = refusing(layer_step.make_layer_step, no_memory)
        patch.setattr(scaling, "make_layer_step", make_layer_step)
        args = ["--n-state", "8", "12", "4", *TINY, "--out", str(directory)]
        n_state_scaling.main(args)
    return directory


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_json_says_what_was_timed_and_where(results: dict[str, Any]) -> None:
    assert results["device"] == "cpu"
    assert results["versions"]["jax"] == jax.__version__
    assert results["config"] == {
        "n_states": [4, 8, 12],
        "d_inner": 16,
        "dim": 16,
        "batch_size": 1,
        "seq_len": 2,
        "dtype": "float32",
        "implementation": "scan",
        "repetitions": 2,
    }
    sizes = [(x["n_state"], x["n_heads"], x["d_inner"]) for x in results["results"]]
    assert sizes == [(4, 4, 16), (8, 2, 16), (12, 1, 12)]
    assert results["published"]["tokens_per_second"]["96"] == "<1K"


def test_numbers_fit_together(results: dict[str, Any]) -> None:
    for row in results["results"][:2]:
        assert row["elements"] == 2 * row["d_inner"] * row["n_state"]
        both = row["timings"]["forward+backward"]["ms"]
        assert row["forward_ms"] + row["backward_ms"] == pytest.approx(both, abs=1e-5)
        assert row["recurrence_tokens_per_second"] == pytest.approx(2e3 / both, rel=1e-3)
        ps = row["forward_ms"] * 1e9 / row["elements"]
        assert row["forward_ps_per_element"] == pytest.approx(ps, rel=1e-6)
        ratio = row["backward_ms"] / row["forward_ms"]
        assert row["backward_over_forward"] == pytest.approx(ratio, abs=1e-3)
        step = row["timings"]["training step"]
        assert 0 < step["p10_ms"] <= step["ms"] == row["training_step_ms"]
        assert row["training_step_tokens_per_second"] == pytest.approx(2e3 / step["ms"], rel=1e-3)


def test_what_could_not_be_timed_is_missing_with_the_reason(results: dict[str, Any]) -> None:
    row = results["results"][2]
    assert row["missing"] == {
        "recurrence": "12 is too odd",
        "training step": "RESOURCE_EXHAUSTED: out of memory",
    }
    assert row["timings"] == {}
    assert row["forward_ms"] is row["training_step_tokens_per_second"] is None


def test_csv_and_plot_go_with_the_json(out: Path, results: dict[str, Any]) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(scaling_report.FILES)
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, results["results"], strict=True):
        del row["timings"]
        row["missing"] = "; ".join(f"{what}: {why}" for what, why in row["missing"].items())
        assert line == {key: "" if x is None else str(x) for key, x in row.items()}
    image = imread(out / "results.png")
    assert image.shape[1] > 1000
    assert image.std() > 0.05


def test_results_of_before_are_not_overwritten(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "results.json").read_bytes()
    assert exit_code(monkeypatch, *TINY, "--n-state", "4", "--out", str(out)) == 2
    assert "is not empty: choose another directory." in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


def exit_code(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["n_state_scaling.py", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.run(n_state_scaling.main)
    return stopped.value.code


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("--n-state 0 4", "--n-state must be at least 1, got 0."),
        ("--n-state", "--n-state must name at least one size."),
        ("--n-state 4 32", "--d-inner must be at least as large as every --n-state, "),
        ("--seq-len -1", "--seq-len must be at least 1, got -1."),
        ("--implementation mosaic_gpu", "needs an NVIDIA GPU of compute capability 8.0 or later"),
        ("--n-states 4", "unknown argument --n-states: did you mean --n-state?"),
    ],
)
def test_mistakes_are_one_sentence(
    args: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(monkeypatch, *TINY, *args.split()) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_nothing_timed_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("no memory")

    monkeypatch.setattr(recurrence_timing, "time_calls", fail)
    monkeypatch.setattr(scaling, "time_calls", fail)
    out = tmp_path / "out"
    assert exit_code(monkeypatch, *TINY, "--n-state", "4", "--out", str(out)) == 1
    captured = capsys.readouterr()
    assert "n_state 4 x 4 heads: missing: recurrence: no memory; training step" in captured.out
    assert captured.err == "n_state_scaling.py: nothing could be timed.\n"
    assert len(list(out.iterdir())) == 3


def test_what_was_timed_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_calls(program: Any, input_sets: Any, *_: Any) -> timing.Numbers:
        del program
        if input_sets[0].get("q", jnp.zeros(4)).shape[-1] == 8:
            raise KeyboardInterrupt
        return {"ms": 1.0, "compile_seconds": 0.0, "clock_mhz": None}

    monkeypatch.setattr(recurrence_timing, "time_calls", time_calls)
    monkeypatch.setattr(scaling, "time_calls", time_calls)
    out = tmp_path / "out"
    assert exit_code(monkeypatch, *TINY, "--n-state", "4", "8", "--out", str(out)) == 130
    (row,) = json.loads((out / "results.json").read_text())["results"]
    assert (row["n_state"], row["training_step_ms"]) == (4, 1.0)
    assert (out / "results.png").exists()


def test_a_gpu_has_defaults_and_rules_of_its_own() -> None:
    with target.use(target.H100):
        setting = n_state_scaling.resolve(n_state_scaling.ScalingConfig())
    assert (setting.implementation, setting.dtype) == ("mosaic_gpu", "bfloat16")
    assert (setting.batch_size, setting.seq_len, setting.dim) == (8, 2048, 2304)
    heads = {n_state: setting.shape(n_state).H for n_state in setting.n_states}
    assert heads == {16: 144, 32: 72, 48: 48, 64: 36, 72: 32, 96: 24, 128: 18}
    refused = pytest.raises(
        n_state_scaling.UsageError, match="multiples of 4 for mosaic_gpu, got 30"
    )
    with target.use(target.H100), refused:
        n_state_scaling.resolve(n_state_scaling.ScalingConfig(n_state=(32, 30)))


def test_the_step_trains_and_consumes_its_state() -> None:
    config = lm_config(dim=8, n_heads=2, n_state=4, dtype="float32")
    step, state, x = layer_step.make_layer_step(config, batch=2, seq_len=1)
    first = jax.tree.leaves(state)
    losses = []
    for _ in range(5):
        state, loss = step(state, x)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] > 0
    assert all(leaf.is_deleted() for leaf in first)


def row(n_state: int, ms: float | None) -> scaling.Row:
    """One whose passes and training step all take `ms`; forward and backward together twice it."""
    setting = scaling.Setting(
        n_states=(n_state,),
        d_inner=96,
        dim=96,
        batch_size=1,
        seq_len=10,
        dtype="float32",
        implementation="scan",
        repetitions=1,
    )
    passes = {} if ms is None else {"forward": {"ms": ms}, "backward": {"ms": ms}}
    if ms is not None:
        passes["forward+backward"] = {"ms": 2 * ms}
    step = None if ms is None else {"ms": ms}
    return scaling.Measurement(setting.shape(n_state), passes, step, {}).row()


def test_table_and_conclusions() -> None:
    rows = [row(16, 1.0), row(32, 1.5), row(96, None)]
    *_, first, second, last = scaling_report.table(rows).splitlines()
    assert first.split()[:5] == ["16", "6", "96", "1.00", "1.00"]
    assert second.split()[-1] == "18-21K"
    assert last.split() == ["96", "1", "96", *["-"] * 8, "<1K"]
    # 2 ms over 10 * 6 * 16^2 elements, and 3 ms over 10 * 3 * 32^2; 10 tokens in 2 ms and in 1 ms.
    assert scaling_report.conclusions(rows) == [
        "lowest cost per state element: n_state 32, 97,656 ps forward and backward",
        "most tokens/s, recurrence: n_state 16, 5,000",
        "most tokens/s, training step of a layer: n_state 16, 10,000",
    ]
    assert scaling_report.conclusions([row(96, None)]) == []
