"""The program that times the training step over several GPUs, without any."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, train_step
from benchmarks.measure.flags import parse_with_preset
from benchmarks.measure.gpu_profile import COMMUNICATION
from benchmarks.scaling import Point
from experiments.cli.errors import UsageError


def _numbers(args: list[str]) -> dict[str, Any]:
    """Numbers of a machine whose every further GPU adds 0.9 of the first."""
    config = parse_with_preset(train_step.BenchmarkConfig, args)
    rows = config.batch.batch_size
    n = int(config.mesh.partition("=")[2])
    return {
        "config": {"mesh": config.mesh, "batch": {"batch_size": rows, "seq_len": 2048}},
        "devices": f"{n} x GPU" + (f" ({config.mesh})" if "data" not in config.mesh else ""),
        "versions": {"jax": "1"},
        "commit": "abc",
        "parameters": config.model.count_params(),
        "tokens_per_second": 1000.0 * (1 + 0.9 * (n - 1)),
        "tokens_per_step": rows * 2048,
        "step_seconds": [0.2, 0.3, 0.4],
        "compile_seconds": 20.0,
        "mfu": 0.4,
        "product_tflops": 1.0,
        "recurrence_tflops": 1.0,
        "peak_bytes_in_use": 60e9,
        "argument_bytes": 1,
        "temporary_bytes": 1,
        "part_ms": {COMMUNICATION: 30.0},
        "communication_alone_ms": 4.0,
    }


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The flags of the points that were timed, on a host with four GPUs."""
    points: list[list[str]] = []

    def measure_apart(args: list[str]) -> dict[str, Any]:
        points.append(args)
        return {"error": "out of memory"} if "fsdp=4" in args else _numbers(args)

    monkeypatch.setattr(train_step, "measure_apart", measure_apart)
    monkeypatch.setattr(scaling, "visible_gpus", lambda _: 4)
    return points


def test_points(timed: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, image = tmp_path / "scaling.json", tmp_path / "scaling.png"
    flags = ["--models", "500M", "7B", "--json", str(path)]
    scaling.main([*flags, "--plot", str(image)])
    points = json.loads(path.read_text())["points"]
    of_500m = ["data=1", "data=2", "fsdp=2", "data=4", "fsdp=4"]
    names = [f"500M, 16 x 2048 a GPU, {mesh}" for mesh in of_500m]
    long = "1 x 8192 a GPU"
    for mesh in ("data=1", "heads=2", "heads=4"):
        names += [f"500M, {long}, {mesh}", f"500M, {long}, {mesh}, 2 chunks"]
    names += [f"7B, {rows} x 2048 a GPU, fsdp=4" for rows in (4, 8)]
    names += [f"7B, {long}, heads=2", f"7B, {long}, heads=2, 2 chunks"]
    assert list(points) == names
    rows = [args[args.index("--batch-size") + 1] for args in timed]
    assert rows == ["16", "32", "32", "64", "64", *["1"] * 6, "16", "32", "1", "1"]
    chunks = [args[args.index("--time-chunks") + 1] for args in timed]
    assert chunks == ["2" if name.endswith(", 2 chunks") else "1" for name in names]
    assert all({"--profile", "--mesh"} <= set(args) for args in timed)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| 500M") and "data=4" in line)
    assert "| 16 x 2048 | 3,700 | 0.925 | 40 % | 300 (200 to 400) | 30 (4) | 60 | 20 |" in row
    assert "| 500M | fsdp=4 | 16 x 2048 | out of memory |  |  |  |  |  |  |" in lines
    assert scaling.lines_of(points, ("data", "fsdp")) == {
        "500M, 16 x 2048, data": pytest.approx({1: 1, 2: 0.95, 4: 0.925}),
        "500M, 16 x 2048, fsdp": pytest.approx({1: 1, 2: 0.95}),
    }
    assert scaling.lines_of(points, ("heads",)) == {
        "500M, 1 x 8192, heads": pytest.approx({1: 1, 2: 0.95, 4: 0.925}),
        "500M, 1 x 8192, 2 chunks, heads": pytest.approx({1: 1, 2: 0.95, 4: 0.925}),
    }
    assert image.read_bytes().startswith(b"\x89PNG")
    timed.clear()
    scaling.main([*flags, "--missing"])
    assert [args[args.index("--mesh") + 1] for args in timed] == ["fsdp=4"] * 3


def test_what_is_compared_is_of_one_kind() -> None:
    one, two, four = (Point("500M", 16, 2048, "data", n) for n in (1, 2, 4))
    numbers = {str(x): _numbers(scaling.flags_of(x, 1)) for x in (one, two, four)}
    assert scaling.efficiencies(numbers) == pytest.approx({one: 1, two: 0.95, four: 0.925})
    numbers[str(two)]["commit"] = "def"
    numbers[str(four)]["devices"] = "4 x another GPU"
    assert scaling.efficiencies(numbers) == {one: 1}
    del numbers[str(one)]
    assert scaling.efficiencies(numbers) == {}


def test_chunks_are_compared_with_one_gpu_without() -> None:
    one = Point("1B", 1, 8192, "data", 1)
    chunks, two = one._replace(time_chunks=2), one._replace(axis="heads", n=2, time_chunks=2)
    numbers = {str(x): _numbers(scaling.flags_of(x, 1)) for x in (one, chunks, two)}
    numbers[str(chunks)]["tokens_per_second"] = 1100.0
    assert scaling.efficiencies(numbers) == pytest.approx({one: 1, chunks: 1.1, two: 0.95})
    (line,) = scaling.lines_of(numbers, ("heads",)).values()
    assert line == pytest.approx({1: 1.1, 2: 0.95})
    del numbers[str(one)]
    assert scaling.efficiencies(numbers) == {}


def test_a_gpu_that_is_not_known_has_no_mfu() -> None:
    point = Point("1B", 8, 2048, "fsdp", 2)
    numbers = _numbers(scaling.flags_of(point, 1))
    del numbers["mfu"]
    ((*_, efficiency, mfu, _, _, _, _),) = scaling.table({str(point): numbers})[1]
    assert (efficiency, mfu) == ("", "")


def test_models_have_their_sizes() -> None:
    for name, model in scaling.MODELS.items():
        size = float(name[:-1]) * (1e9 if name.endswith("B") else 1e6)
        config = parse_with_preset(train_step.BenchmarkConfig, model.flags.split())
        assert 0.95 * size < config.model.count_params() < 1.05 * size


@pytest.mark.usefixtures("timed")
def test_nothing_is_drawn_without_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main(["--models", "7B", "--plot", str(tmp_path / "plot.png")])
    assert "plot.png is not drawn: no point" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_that_need_more_gpus_are_left_out(
    timed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main(["--models", "500M", "7B", "--gpus", "1", "1"])
    assert "left out: 7B needs 2 GPUs or more" in capsys.readouterr().err
    assert [args[args.index("--mesh") + 1] for args in timed] == ["data=1"] * 3


def test_chosen_axes(timed: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--models", "500M", "7B", "--axes", "data", "--gpus", "1", "4"])
    assert "left out: 7B is not timed along data." in capsys.readouterr().err
    assert [args[args.index("--mesh") + 1] for args in timed] == ["data=1", "data=4"]


def test_another_programs_points(timed: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text('{"points": {"--preset h72n32-500m": {}}}')
    with pytest.raises(UsageError, match="'--preset h72n32-500m' is no point of"):
        scaling.main(["--json", str(path)])
    assert not timed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--gpus 8", "--gpus asks for 8, and 4 are here"),
        ("--models 7B --gpus 1", "no point for --gpus 1: 7B needs 2 GPUs"),
        ("--models 7B --gpus 3", "no point for --gpus 3: 7B needs 2 GPUs or more, which divide it"),
        ("--models 6B", "--models are 500M, 1B, 3B, 7B, got 6B"),
        ("--axes", "--axes needs one of data, fsdp, heads"),
        ("--axes rows", "--axes are data, fsdp, heads, got rows"),
        ("--models 7B --axes data", "no point for --gpus 1 2 4: 7B is not timed along data"),
        ("--missing", "--missing is for --json"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--plot no/such/file", "no/such/file cannot be written"),
    ],
)
@pytest.mark.usefixtures("timed")
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        scaling.main(flags.split())


def test_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "visible_gpus", lambda _: 0)
    with pytest.raises(UsageError, match="no GPU is here"):
        scaling.main([])
