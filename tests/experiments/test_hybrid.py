"""A model of several kinds of mixers trains, resumes, samples and is refused on other flags."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from e88_jax import LanguageModel, LMConfig
from e88_jax.mixers import config_type
from experiments import sample, train_byte_lm
from experiments.cli.errors import UsageError
from experiments.tasks.bytes import ByteLMConfig
from experiments.trained import load_trained

LAYOUT = "e88,gated_deltanet,mamba2,attention,lstm"
"""Kinds of mixers; the model has one layer more, so that they are repeated."""
LAYERS: dict[str, dict[str, int]] = {
    "e88": {"n_heads": 2, "n_state": 4},
    "gated_deltanet": {"n_heads": 2, "head_dim": 4},
    "mamba2": {"d_state": 4, "head_dim": 4},
    "attention": {"n_heads": 2, "head_dim": 4, "window": 8},
    "lstm": {"width": 5},
}
"""Fields of each kind's configuration. Another value of the first one is tried on a resume."""

KINDS = LAYOUT.split(",")
DEPTH = len(KINDS) + 1
TRAINING = [
    *"--seq-len 16 --batch-size 4 --log-every 2 --eval-every 4 --save-every 2".split(),  # noqa: SIM905
    *"--eval-bytes 128 --sample-bytes 0".split(),  # noqa: SIM905
    *"--optimizer muon --warmup-steps 0".split(),  # noqa: SIM905
]


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module", autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        yield


def flags_of_layers(**changes: Any) -> list[str]:
    """The flags of the layout, with other ones as `kind={field: value}`."""
    values = {kind: {**fields, **changes.get(kind, {})} for kind, fields in LAYERS.items()}
    return [
        word
        for kind, fields in values.items()
        for name, value in fields.items()
        for word in (flag(kind, name), str(value))
    ]


def flag(kind: str, field: str) -> str:
    return f"--{kind}.{field}".replace("_", "-")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 8 steps, and the same resumed from its fourth."""
    here = tmp_path_factory.mktemp("hybrid")
    (here / "text").write_bytes(b"abcdefgh" * 500)
    begin = [*TRAINING, "--data", str(here / "text"), "--layout", LAYOUT, *flags_of_layers()]
    begin += ["--dim", "16", "--depth", str(DEPTH)]
    whole, parts = here / "whole", here / "parts"
    train_byte_lm.main([*begin, "--out", str(whole), "--steps", "8", "--keep", "4"])
    shutil.copytree(whole, parts)
    for step in ("6", "8"):
        shutil.rmtree(parts / "checkpoints" / step)
    train_byte_lm.main(["--out", str(parts), "--resume"])
    return whole, parts


@functools.cache
def trained(run: Path) -> LanguageModel:
    model, step = load_trained(run, ByteLMConfig, latest=True)
    assert step == 8
    return model


def parameters(run: Path) -> list[np.ndarray]:
    state = nnx.state(trained(run), nnx.Param)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "bytes_per_second"} for line in lines]


def test_it_learns_and_resumes_bit_for_bit(runs: tuple[Path, Path]) -> None:
    whole, parts = runs
    for resumed, expected in zip(parameters(parts), parameters(whole), strict=True):
        np.testing.assert_array_equal(resumed, expected)
    assert records(parts) == records(whole)
    losses = [record["loss"] for record in records(whole) if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.01


def test_its_layers_are_those_of_the_flags(runs: tuple[Path, Path]) -> None:
    model = json.loads((runs[1] / "run.json").read_text())["config"]["model"]
    assert [layer["kind"] for layer in model["layers"]] == KINDS
    for layer in model["layers"]:
        assert LAYERS[layer["kind"]].items() <= layer.items()
    config = LMConfig.from_dict(model)
    assert config.layers == tuple(config_type(kind)(**LAYERS[kind]) for kind in KINDS)
    n_params = sum(leaf.size for leaf in parameters(runs[1]))
    assert n_params == config.count_params()
    mixers = [type(block.mixer).__name__ for block in trained(runs[1]).blocks]
    assert mixers[-1] == mixers[0]
    assert len(set(mixers)) == len(LAYERS)


def test_it_samples(runs: tuple[Path, Path], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    sample.main([str(runs[1]), "--prompt", "abc", "--length", "9", "--temperature", "0"])
    first = capfdbinary.readouterr().out
    assert first.startswith(b"abc")
    assert len(first) >= len(b"abc") + 9
    sample.main([str(runs[0]), "--prompt", "abc", "--length", "9", "--temperature", "0"])
    assert capfdbinary.readouterr().out == first


@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers_are_refused_by_their_flag(runs: tuple[Path, Path], kind: str) -> None:
    name, value = next(iter(LAYERS[kind].items()))
    change = flag(kind, name), str(value + 1)
    with pytest.raises(UsageError) as error:
        train_byte_lm.main(["--out", str(runs[1]), "--resume", *change])
    assert f"another configuration, {change[0]} {value} (not {value + 1}): " in str(error.value)


def test_another_layout_is_refused(runs: tuple[Path, Path]) -> None:
    other = ",".join(reversed(KINDS))
    assert other != LAYOUT
    with pytest.raises(UsageError) as error:
        train_byte_lm.main(["--out", str(runs[1]), "--resume", "--layout", other])
    assert f"another configuration, --layout {LAYOUT} (not {other}): " in str(error.value)


def test_a_mistyped_flag_of_a_stored_layer(runs: tuple[Path, Path]) -> None:
    kind, name = next((kind, name) for kind in LAYERS for name in LAYERS[kind])
    meant = flag(kind, name)
    for word in (meant[:-1], "--" + meant.partition(".")[2]):
        with pytest.raises(UsageError, match=f"unknown argument {word}: did you mean {meant}"):
            train_byte_lm.main(["--out", str(runs[1]), "--resume", word, "3"])
