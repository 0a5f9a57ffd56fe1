"""A mixer of one file and one line of the registry trains, resumes, samples and is counted."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx

from e88_jax import E88Config, LanguageModel, LMConfig
from e88_jax.mixers import MIXERS
from e88_jax.optim import muon_dimensions
from experiments import sample, train_byte_lm
from experiments.cli.errors import UsageError
from experiments.harness.program import parse_args
from experiments.tasks.bytes import ByteLMConfig
from tests.reference.configs import n_params
from tests.reference.toy_mixer import TOY, ToyConfig


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one line."""
    monkeypatch.setitem(MIXERS, ToyConfig.kind, TOY)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        yield


def config(width: int) -> LMConfig:
    return LMConfig(dim=16, depth=2, layers=(ToyConfig(width=width),))


def test_counts() -> None:
    model = LanguageModel(config(width=5), rngs=nnx.Rngs(0))
    built = n_params(model)
    assert model.config.count_params() == built == 256 * 16 + 2 * (16 + 2 * 16 * 5 + 5) + 16
    assert model.config.state_size() == sum(x.size for x in model.init_state(1)) == 10
    assert model.config.flops_per_token() == (6 * built, 2 * 10 * 5)


def test_json() -> None:
    written = json.loads(json.dumps(config(width=5).to_dict()))
    assert written["layers"] == [{"kind": "toy", "width": 5}]
    assert LMConfig.from_dict(written) == config(width=5)


def test_muon_takes_its_matrices() -> None:
    params = nnx.state(LanguageModel(config(width=5), rngs=nnx.Rngs(0)), nnx.Param)
    taken = muon_dimensions(params)
    assert taken["blocks"][0]["mixer"]["inputs"]["kernel"] is not None
    assert taken["blocks"][1]["mixer"]["outputs"]["kernel"] is not None
    assert taken["blocks"][0]["mixer"]["rate"] is None
    assert taken["embed"]["embedding"] is None
    assert taken["norm"]["scale"] is None


def test_it_trains_resumes_and_samples(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    data = tmp_path / "text"
    data.write_bytes(b"abcdefgh" * 500)
    model = ["--mixer", "toy", "--width", "7", "--dim", "16", "--depth", "2"]
    flags = ["--data", str(data), "--seq-len", "16", "--batch-size", "4", "--log-every", "2"]
    flags += [
        "--eval-every",
        "4",
        "--save-every",
        "2",
        "--eval-bytes",
        "128",
        "--sample-bytes",
        "0",
    ]
    # A rate that does not depend on the number of steps.
    flags += ["--optimizer", "muon", "--warmup-steps", "0", "--final-lr-fraction", "1"]
    parts = tmp_path / "parts"
    train_byte_lm.main([*flags, *model, "--out", str(parts), "--steps", "4"])
    train_byte_lm.main(["--out", str(parts), "--resume", "--steps", "8"])
    with pytest.raises(UsageError, match=r"another configuration, --width 7 \(not 9\)"):
        train_byte_lm.main(["--out", str(parts), "--resume", "--width", "9"])
    with pytest.raises(UsageError, match="unknown argument --widht: did you mean --width"):
        train_byte_lm.main(["--out", str(parts), "--resume", "--widht", "9"])
    layers = json.loads((parts / "run.json").read_text())["config"]["model"]["layers"]
    assert layers == [{"kind": "toy", "width": 7}]
    records = map(json.loads, (parts / "metrics.jsonl").read_text().splitlines())
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert list(losses) == [2, 4, 6, 8]
    assert losses[8] < losses[2] - 0.01
    capfdbinary.readouterr()
    sample.main([str(parts), "--prompt", "abc", "--length", "9"])
    assert len(capfdbinary.readouterr().out.removeprefix(b"abc").rstrip(b"\n")) >= 9


def test_a_preset_of_another_mixer_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--preset", "h72n32-500m", "--mixer", "toy", "--width", "5"]
    config = parse_args(ByteLMConfig, args)
    assert config.model.layers == (ToyConfig(width=5),)
    assert "h72n32-500m: dim 2176, toy, depth 20: " in capsys.readouterr().out


def test_a_stored_model_of_several_mixers_keeps_them(tmp_path: Path) -> None:
    layers = E88Config(n_heads=2, n_state=4), ToyConfig(width=5)
    stored = ByteLMConfig(model=LMConfig(dim=16, depth=4, layers=layers), out=tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"config": stored.to_dict()}))
    resumed = parse_args(ByteLMConfig, ["--resume", "--out", str(tmp_path), "--remat", "layer"])
    assert resumed.model.layers == layers
    assert resumed.model.execution.remat == "layer"
