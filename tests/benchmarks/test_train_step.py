"""The program that times the training step, on a model that a CPU does at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import train_step
from benchmarks.measure.flags import parse_with_preset
from e88_jax.sizing import PRESETS
from experiments.cli.errors import UsageError

TINY = ["--dim", "16", "--n-heads", "2", "--n-state", "4", "--depth", "1"]


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> Iterator[None]:
    """As optax raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers.json"
    flags = ["--batch-size", "2", "--seq-len", "8", "--repeats", "2", "--preset", "h32n32-100m"]
    train_step.main([*flags, *TINY, "--json", str(path)])
    numbers = json.loads(path.read_text())
    assert numbers["tokens_per_step"] == 16
    assert numbers["config"]["model"]["dim"] == 16
    assert numbers["config"]["model"]["vocab_size"] == 256
    per_second = numbers["product_tflops"] * 1e12 / numbers["tokens_per_second"]
    assert per_second == pytest.approx(6 * numbers["parameters"], rel=1e-3)
    assert len(numbers["step_seconds"]) == 2
    assert f"{numbers['parameters']:,} parameters, batch 2 of 8" in capsys.readouterr().out


def test_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, timed = tmp_path / "grid.json", []
    results: dict[str, Any] = {"error": "out of memory"}

    def measure_apart(args: list[str]) -> dict[str, Any]:
        timed.append(" ".join(args))
        return dict(results)

    monkeypatch.setattr(train_step, "measure_apart", measure_apart)
    train_step.main(["--grid", "presets", "--json", str(path)])
    grid = train_step.GRIDS["presets"]
    assert {point.model.removeprefix("--preset ") for point in grid} <= set(PRESETS)
    assert len(timed) == sum(len(point.batch_sizes) for point in grid)
    points = json.loads(path.read_text())["points"]
    assert len(points) == len(timed)
    assert all(point == {"error": "out of memory"} for point in points.values())
    timed.clear()
    flags = f"--grid presets --json {path} --preset h72n32-500m --remat layer --lengths 512 8192"
    monkeypatch.setattr(train_step, "summary", str)
    results["numbers"] = 1
    train_step.main(flags.split())
    again = json.loads(path.read_text())["points"]
    assert again.keys() == points.keys()
    changed = {name for name in points if again[name] != points[name]}
    assert changed == {
        f"--preset h72n32-500m --seq-len {length} --batch-size {batch}"
        for length, batch in ((512, 64), (8192, 4))
    }
    assert timed == [
        f"{flags} --preset h72n32-500m --seq-len {length} --batch-size {batch} --profile "
        "--grid None --lengths --no-missing"
        for length, batch in ((512, 64), (8192, 4))
    ]


def test_the_points_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that failed are among them."""
    path, timed = tmp_path / "grid.json", []

    def measure_apart(args: list[str]) -> dict[str, Any]:
        timed.append(" ".join(args))
        return {"error": "out of memory"} if "--preset mamba2-500m" in timed[-1] else {"n": 1}

    monkeypatch.setattr(train_step, "measure_apart", measure_apart)
    monkeypatch.setattr(train_step, "summary", str)
    flags = ["--grid", "mixers", "--missing", "--json", str(path)]
    train_step.main(flags)
    first = timed.copy()
    timed.clear()
    train_step.main(flags)
    assert 0 < len(timed) < len(first)
    assert timed == [x for x in first if "--preset mamba2-500m" in x]


def test_the_models_beside_e88_are_of_its_size() -> None:
    for point in train_step.GRIDS["mixers"]:
        config = parse_with_preset(train_step.BenchmarkConfig, point.model.split())
        assert 495e6 < config.model.count_params() < 509e6


def test_another_file_is_not_taken_for_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UsageError, match=f"{path} does not hold a grid"):
        train_step.main(["--grid", "presets", "--json", str(path)])


def test_a_point_of_the_grid_runs_apart() -> None:
    measure_apart = train_step.measure_apart
    point = "--preset h32n32-100m --batch-size 2 --seq-len 8 --repeats 1"
    flags = [*point.split(), *TINY]
    numbers = measure_apart(["--grid", "presets", "--lengths", "512", *flags, *train_step.ALONE])
    assert numbers["tokens_per_step"] == 16
    row = measure_apart(["--preset", "none"])
    assert row["command"] == "--preset none"
    assert "unknown preset 'none'" in row["error"]
    row = measure_apart([*flags, "--implementation", "mosaic_gpu"])
    assert row["error"].startswith("NotImplementedError: implementation='mosaic_gpu' needs")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--preset x", "unknown preset 'x'"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--lengths 8", "--lengths is for --grid"),
        ("--grid presets --seq-len 8", "--grid has lengths and batch sizes of its own"),
        ("--grid presets --lengths 8", "the grid has no such point: there are"),
        ("--missing --grid presets", "--missing is for --grid with --json"),
        ("--json no/such/file", "no/such/file cannot be written"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        train_step.main(flags.split())
