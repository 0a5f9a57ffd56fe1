"""Configurations of runs: their bounds, and back from JSON."""

import copy
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.errors import UsageError
from experiments.harness import program
from experiments.harness.config import BatchConfig, OptimizerConfig, check_resumable
from experiments.tasks.bytes import ByteLMConfig, BytesConfig
from tests.reference.configs import lm_config

parse_args = functools.partial(program.parse_args, ByteLMConfig)

COUNTS = [
    *["steps", "log-every", "eval-every", "eval-bytes", "save-every", "keep", "max-skipped-steps"],
    *["seq-len", "batch-size", "accumulate"],
]
FROM_ZERO = ["sample-bytes", "warmup-steps", "seed"]
RATES = ["learning-rate", "clip-norm", "final-lr-fraction", "weight-decay"]
FRACTIONS = ["beta1", "beta2", "val-fraction"]


def build(flag: str, value: float) -> ByteLMConfig:
    """As the command line does, which takes longer."""
    name = flag.replace("-", "_")
    values: dict[str, Any] = {name: value}
    groups: dict[str, Any] = {
        "task": BytesConfig,
        "batch": BatchConfig,
        "optimizer": OptimizerConfig,
    }
    for group, kind in groups.items():
        if name in kind.__dataclass_fields__:
            values = {group: kind(**values)}
    return ByteLMConfig(**values)


def refused(flag: str, value: float) -> str:
    with pytest.raises(ValueError, match=rf"^--{flag} must be .*, got .*\.$") as error:
        build(flag, value)
    return str(error.value)


@pytest.mark.parametrize("flag", [*COUNTS, *FROM_ZERO])
def test_counts(flag: str) -> None:
    least = int(flag in COUNTS)
    assert f"must be at least {least}, got {least - 1}." in refused(flag, least - 1)
    limit = 2**32 if flag == "seed" else 2**31
    assert f"must be below 2**{32 if flag == 'seed' else 31}, got {limit}." in refused(flag, limit)
    build(flag, least)


@pytest.mark.parametrize("flag", RATES)
def test_rates(flag: str) -> None:
    least = "above 0" if flag in RATES[:2] else "at least 0"
    for value in (-1.0, math.nan, -math.inf):
        assert f"must be {least}, got {value}." in refused(flag, value)
    for value in (math.inf, 1e39):
        assert f"must be below 1e+38, got {value}." in refused(flag, value)
    build(flag, 1e30)


@pytest.mark.parametrize("flag", FRACTIONS)
def test_fractions(flag: str) -> None:
    for value in (0.0, -0.5, math.nan):
        assert f"must be above 0, got {value}." in refused(flag, value)
    for value in (1.0, 1.5, math.inf):
        assert "must be below " in refused(flag, value)
    build(flag, 0.999999)


def test_a_decay_that_float32_rounds_to_1() -> None:
    """It would divide by zero in the bias correction."""
    assert "must be below 0.99999994, got 0.999999999" in refused("beta2", 0.999999999)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="make 5,000,050,000 tokens a step, which must be below 2"):
        BatchConfig(seq_len=100_000, batch_size=10_000, accumulate=5)
    model = lm_config(dim=1_000_000, depth=100, n_heads=1000, n_state=32)
    with pytest.raises(ValueError, match="has 16,100,357,200,000 parameters, and 10,000,000,000"):
        ByteLMConfig(model=model)
    model = lm_config(time_chunks=3)
    with pytest.raises(
        ValueError, match="--seq-len 256 does not divide into --time-chunks 3: 255 o"
    ):
        ByteLMConfig(model=model)
    with pytest.raises(ValueError, match="--prompt must have at least one byte"):
        BytesConfig(prompt="")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--steps 1e30", "invalid literal for int() with base 10: '1e30'"),
        ("--batch-size 2.5", "invalid literal for int() with base 10: '2.5'"),
        ("--beta1 x", "could not convert string to float: 'x'"),
        ("--learning-rate nan", "--learning-rate must be above 0, got nan."),
        ("--out=", "--out is empty: is a shell variable unset?"),
        ("--out", "Missing value for argument '--out'"),
        ("--data", "--data names nothing: is a shell variable unset?"),
        ("--data=", '--data "" names nothing: is a shell variable unset?'),
        ("--data --steps 5", "--data names nothing: is a shell variable unset?"),
    ],
)
def test_mistakes_on_the_command_line(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_args(flags.split())
    assert sentence in str(error.value)


def test_an_empty_directory_is_an_unset_variable() -> None:
    with pytest.raises(UsageError, match=r"--out is empty: is a shell variable unset\?"):
        parse_args(["--out", "", "--steps", "5"])


CONFIG = ByteLMConfig(
    out=Path(os.fsdecode(b"runs/\xff")),
    steps=7,
    preset="a",
    task=BytesConfig(data=("a", os.fsdecode(b"\xff\n"))),
    batch=BatchConfig(stateful=True),
    optimizer=OptimizerConfig(optimizer="muon", weight_decay=0),
    model=lm_config(dim=8, depth=2, n_heads=2, n_state=4, dtype="bfloat16"),
)


def test_through_json_and_back() -> None:
    assert ByteLMConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    assert ByteLMConfig.from_dict(ByteLMConfig().to_dict()) == ByteLMConfig()


def change(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda values: values.pop("steps"), "the configuration has no steps"),
        (lambda values: values["batch"].pop("seed"), "batch has no seed"),
        (lambda values: values["optimizer"].pop("beta1"), "optimizer has no beta1"),
        (change("stepz", to=1), "the configuration has an unknown stepz"),
        (change("task", "beta1", to=1), "task has an unknown beta1"),
        (change("steps", to="7"), "steps is '7', which is not of type int"),
        (change("steps", to=7.0), "steps is 7.0, which is not of type int"),
        (change("steps", to=True), "steps is True, which is not of type int"),
        (change("steps", to=None), "steps is None, which is not of type int"),
        (change("steps", to=-7), "--steps must be at least 1, got -7"),
        (change("resume", to=0), "resume is 0, which is not of type bool"),
        (change("out", to=3), r"out is 3, which is not of type .*Path \| None"),
        (change("preset", to=["a"]), r"preset is \['a'\], which is not of type str \| None"),
        (change("batch", to=[]), "batch has no accumulate"),
        (change("task", "data", to="text"), "data is 'text', which is not of type"),
        (change("task", "data", to=["a", 1]), "data is 1, which is not of type str"),
        (change("task", "val_fraction", to=2), "--val-fraction must be below 1, got 2"),
        (change("optimizer", "learning_rate", to="x"), "learning_rate is 'x'"),
        (change("optimizer", "clip_norm", to=float("nan")), "--clip-norm must be above 0, got nan"),
        (change("optimizer", "optimizer", to="sgd"), "optimizer is 'sgd', which is not of type"),
        (change("model", to=None), "model"),
        (change("model", "depth", to="2"), "depth|model"),
        (change("model", "dim", to=0), "dim must be at least 1, got 0"),
        (change("model", "layers", 0, "n_heads", to=0), "n_heads must be at least 1, got 0"),
        (change("model", "layers", 0, "n_headz", to=0), "n_headz"),
        (change("model", "layers", 0, "kind", to="e89"), "kind must be one of e88.*'e89'"),
        (lambda values: values["model"].pop("layers"), "layers"),
    ],
)
def test_what_is_no_configuration(damage: Callable[[Any], None], sentence: str) -> None:
    values = copy.deepcopy(CONFIG.to_dict())
    damage(values)
    with pytest.raises(ValueError, match=sentence):
        ByteLMConfig.from_dict(values)


@pytest.mark.parametrize("values", [None, [], "text", {}])
def test_what_is_no_dictionary_of_it(values: Any) -> None:
    with pytest.raises(ValueError, match="the configuration has no batch"):
        ByteLMConfig.from_dict(values)


def test_what_may_change_on_resume() -> None:
    def with_values(*keys: str | int, to: Any) -> ByteLMConfig:
        values = copy.deepcopy(CONFIG.to_dict())
        change(*keys, to=to)(values)
        return ByteLMConfig.from_dict(values)

    may = {
        **{(name,): 3 for name in ("steps", "log_every", "eval_every", "save_every", "keep")},
        **{("task", "sample_bytes"): 9, ("task", "prompt"): "x", ("task", "data"): ["b"]},
        **{("out",): "elsewhere", ("resume",): True, ("optimizer", "max_skipped_steps"): 3},
        **{("model", "execution", "remat"): "layer"},
        **{("model", "execution", "implementation"): "scan"},
        **{("model", "execution", "dtype"): "float32"},
        **{("model", "execution", "saved_state_interval"): 8},
        **{("model", "execution", "time_chunks"): 2},
    }
    for keys, to in may.items():
        check_resumable(CONFIG, with_values(*keys, to=to))
    may_not = {
        **{("task", "eval_bytes"): 3, ("preset",): "b", ("params",): "5M", ("gpu",): "h100"},
        **{("batch", name): 3 for name in ("seq_len", "batch_size", "accumulate", "seed")},
        **{("task", "val_fraction"): 0.3, ("batch", "stateful"): False},
        **{("optimizer", name): 0.5 for name in ("learning_rate", "beta1", "beta2", "clip_norm")},
        **{
            ("optimizer", name): 1 for name in ("warmup_steps", "weight_decay", "final_lr_fraction")
        },
        **{("optimizer", "optimizer"): "adamw", ("model", "depth"): 3},
        **{("model", "layers", 0, name): True for name in ("write_gate", "tie_kv", "output_norm")},
    }
    for keys, to in may_not.items():
        flag = "--" + str(keys[-1]).replace("_", "-")
        with pytest.raises(UsageError, match=rf"another configuration, {flag} \S+ \(not {to}\)"):
            check_resumable(CONFIG, with_values(*keys, to=to))
