"""--preset, --params and --gpu of the training program."""

import functools
import json
from pathlib import Path

import pytest

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from e88_jax.sizing import BASELINES, PRESETS
from experiments.cli.errors import UsageError
from experiments.harness import program
from experiments.harness.config import DEFAULT_MODEL
from experiments.tasks.bytes import ByteLMConfig

parse_args = functools.partial(program.parse_args, ByteLMConfig)


def test_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_args(["--preset", "h72n32-500m", "--steps", "5"])
    assert config.model == PRESETS["h72n32-500m"].config
    assert config.steps == 5
    assert capsys.readouterr().out == (
        "h72n32-500m: dim 2176, 72 heads of 32 (d_inner 2304), depth 20: "
        f"{config.model.count_params():,} parameters\n"
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_args(["--preset", name])
    assert config.model == BASELINES[name].config
    (layer,) = config.model.layers
    assert f"{name}: dim {config.model.dim}, {layer.kind}, depth" in capsys.readouterr().out


def test_flags_of_the_model_change_it() -> None:
    flags = [
        "--preset",
        "h72n32-500m",
        "--depth",
        "3",
        "--write-gate",
        "--saved-state-interval",
        "64",
    ]
    model = parse_args(flags).model
    assert model == LMConfig(
        dim=2176,
        depth=3,
        layers=(E88Config(n_heads=72, n_state=32, write_gate=True),),
        execution=Execution(saved_state_interval=64),
    )


@pytest.mark.parametrize("gpu", ["rtx4090", "h100"])
def test_a_budget(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_args(["--params", "25M", "--gpu", gpu])
    count = config.model.count_params()
    assert abs(count / 25e6 - 1) <= 0.01
    assert f"25M: dim {config.model.dim}, " in capsys.readouterr().out


def test_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_args([]).model == DEFAULT_MODEL
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_its_model(tmp_path: Path) -> None:
    config = parse_args(["--params", "1M", "--gpu", "h100", "--out", str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"config": config.to_dict()}))
    resumed = parse_args(["--resume", "--out", str(tmp_path)])
    assert resumed.model == config.model
    with pytest.raises(UsageError, match="--params 1M \\(not 2M\\)"):
        parse_args(["--resume", "--out", str(tmp_path), "--params", "2M"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--preset", "h1"], "unknown preset 'h1': choose from h32n32-100m"),
        (["--params", "9"], "must be 1M to 10B parameters, got 9"),
        (["--params", "x"], "such as 500M"),
        (["--params", "5M", "--gpu", "gtx"], "unknown GPU 'gtx': choose from rtx3090"),
        (["--gpu", "h100"], "--params, which is not given"),
        (["--params", "5M", "--preset", "h72n32-500m"], "give one of them"),
    ],
)
def test_mistakes(flags: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_args(flags)
    assert sentence in str(error.value)
