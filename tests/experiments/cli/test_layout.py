"""--layout: mixers of several kinds on the command line, each with flags of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decode import DecodeConfig
from benchmarks.measure.flags import parse_with_preset
from benchmarks.plan import PlanConfig
from benchmarks.train_step import BenchmarkConfig
from e88_jax import E88Config, LMConfig
from e88_jax.mixers.baselines import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LSTMConfig,
    Mamba2Config,
)
from e88_jax.sizing import PRESETS, e88_layer
from experiments import cli
from experiments.cli.errors import UsageError
from experiments.harness.config import DEFAULT_MODEL
from experiments.harness.program import parse_args
from experiments.tasks.bytes import ByteLMConfig

ROOT = Path(__file__).parents[3]
DEFAULT_E88 = e88_layer(DEFAULT_MODEL)


def model_of(flags: str) -> LMConfig:
    return parse_args(ByteLMConfig, flags.split()).model


def refusal(flags: str) -> str:
    with pytest.raises(UsageError) as error:
        model_of(flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_of_each_kind() -> None:
    model = model_of(
        "--layout e88,e88,attention --depth 7 --dim 64 --e88.n-heads 3 --e88.write-gate "
        "--attention.n-heads 4 --attention.window 64 --remat layer"
    )
    e88 = E88Config(n_heads=3, n_state=DEFAULT_E88.n_state, write_gate=True)
    assert model.layers == (e88, e88, AttentionConfig(n_heads=4, window=64))
    assert [layer.kind for layer in model.mixers] == ["e88", "e88", "attention"] * 2 + ["e88"]
    assert (model.dim, model.depth, model.execution.remat) == (64, 7, "layer")


@pytest.mark.parametrize("prefix", ["gated-deltanet", "gated_deltanet"])
def test_every_type_of_field(prefix: str) -> None:
    model = model_of(
        f"--layout e88,{prefix.replace('-', '_')},mamba2,attention --depth 4 --e88.no-use-silu "
        f"--e88.decay-mode simple --e88.conv-size 4 --{prefix}.n-heads 2 --{prefix}.expand-v=1.5 "
        f"--{prefix}.n-value-heads 4 --{prefix}.negative-eigenvalues --{prefix}.head_dim 32 "
        "--mamba2.expand 3 --mamba2.d-state 16 --attention.n-heads 4 --attention.n-kv-heads 2 "
        "--attention.no-qk-norm --attention.rope-base 5e5 --attention.window None"
    )
    assert model.layers == (
        E88Config(n_heads=8, n_state=32, use_silu=False, decay_mode="simple", conv_size=4),
        GatedDeltaNetConfig(
            n_heads=2, head_dim=32, expand_v=1.5, n_value_heads=4, negative_eigenvalues=True
        ),
        Mamba2Config(expand=3.0, d_state=16),
        AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=False, rope_base=5e5),
    )


@pytest.mark.parametrize(
    ("flags", "layer"),
    [
        ("gated_deltanet --n-heads 2 --expand-v 1.5", GatedDeltaNetConfig(n_heads=2, expand_v=1.5)),
        ("mamba2 --d-state 64", Mamba2Config(d_state=64)),
        ("attention --n-heads 2 --no-qk-norm", AttentionConfig(n_heads=2, qk_norm=False)),
        ("lstm --width 9", LSTMConfig(width=9)),
    ],
)
def test_a_layout_of_one_kind_is_that_mixer_with_prefixed_flags(flags: str, layer: Any) -> None:
    kind, *own = flags.split()
    assert model_of(f"--mixer {flags}").layers == (layer,)
    prefixed = re.sub(r"--(no-)?", rf"--{kind}.\1", " ".join(own))
    assert model_of(f"--layout {kind} {prefixed}").layers == (layer,)


def test_defaults_are_those_of_the_default_models_layer_of_the_kind() -> None:
    assert model_of("--layout e88,mamba2").layers == (DEFAULT_E88, Mamba2Config())
    assert model_of("--layout e88").layers == (DEFAULT_E88,)
    preset = PRESETS["h72n32-500m"].config
    layers = "--layout e88,e88,e88,attention --attention.n-heads 17"
    model = model_of(f"--preset h72n32-500m {layers}")
    assert model.layers == (*[e88_layer(preset)] * 3, AttentionConfig(n_heads=17))
    assert (model.dim, model.depth) == (preset.dim, preset.depth) == (2176, 20)
    changed = model_of(f"--preset h72n32-500m {layers} --e88.output-norm")
    assert changed.layers[0] == E88Config(n_heads=72, n_state=32, output_norm=True)
    budget = model_of(f"--params 25M --gpu h100 {layers}")
    assert budget.layers[0] == model_of("--params 25M --gpu h100").layers[0] != DEFAULT_E88


def test_the_depth_is_that_of_the_preset() -> None:
    """20, while the default is 4."""
    kinds = ",".join(["e88"] * 19 + ["mamba2"])
    assert len(model_of(f"--preset h72n32-500m --layout {kinds}").layers) == 20
    sentence = "has 20 layers, more than --depth 4: shorten the layout or raise --depth."
    assert sentence in refusal(f"--layout {kinds}")


def test_a_hybrid_is_described_by_its_layout(capsys: pytest.CaptureFixture[str]) -> None:
    layers = "--layout e88,e88,e88,attention --attention.n-heads 17"
    model = model_of(f"--preset h72n32-500m {layers}")
    assert capsys.readouterr().out == (
        "h72n32-500m: dim 2176, e88,e88,e88,attention, depth 20: "
        f"{model.count_params():,} parameters\n"
    )


@pytest.mark.parametrize("config", [BenchmarkConfig, DecodeConfig, PlanConfig])
def test_timing_programs_have_it_too(config: type[Any]) -> None:
    flags = "--layout e88,attention --attention.n-heads 3"
    assert parse_with_preset(config, flags.split()).model == model_of(flags)
    kinds = ",".join(["e88"] * 19 + ["attention"])
    flags = f"--preset h72n32-500m --layout {kinds} --attention.n-heads 3"
    assert parse_with_preset(config, flags.split()).model == model_of(flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--layout e88,e89",
            "--layout takes kinds e88, gated_deltanet, mamba2, attention, lstm, joined by commas, "
            "got 'e89'.",
        ),
        (
            "--layout e88,,attention",
            "--layout 'e88,,attention' has an empty element: name kinds as in --layout "
            "e88,e88,attention.",
        ),
        ("--layout e88,", "--layout 'e88,' has an empty element: name kinds as in"),
        ("--layout=", "--layout is empty: name kinds as in --layout e88,e88,attention."),
        ("--layout", "Missing value for argument '--layout'"),
        (
            "--layout e88,e88,e88 --depth 2",
            "the layout e88,e88,e88 has 3 layers, more than --depth 2: shorten the layout or raise",
        ),
        ("--layout e88,e88 --depth 0", "depth must be at least 1, got 0."),
        (
            "--mixer e88 --layout e88,attention",
            "--mixer and --layout both choose the mixers: give --layout for layers of several "
            "kinds, --mixer for layers of one.",
        ),
        ("--layout e88,attention", "--attention.n-heads INT Heads of queries. (required)"),
        ("--layout e88,lstm", "--lstm.width INT Units, each with a cell and an output. (required)"),
        ("--layout e88,mamba2 --mamba2.d-state x", "Error parsing --mamba2.d-state: invalid"),
        (
            "--layout e88,attention --attention.n-heads 3 --attention.n-kv-heads 2",
            "attention: n_kv_heads must divide n_heads, 3, got 2.",
        ),
        ("--layout e88,mamba2 --mamba2.expand 3.3", "expand * dim must be a multiple of head_dim"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    assert sentence in refusal(flags)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        # Without the prefix of a layout.
        ("--layout e88,mamba2 --n-heads 8", "--n-heads: did you mean --e88.n-heads?"),
        ("--layout mamba2 --d-state 8", "--d-state: did you mean --mamba2.d-state?"),
        ("--layout e88,mamba2 --d_state=8", "--d_state=8: did you mean --mamba2.d-state?"),
        ("--layout e88,mamba2 --no-tie-kv", "--no-tie-kv: did you mean --e88.no-tie-kv?"),
        ("--layout e88,mamba2 --conv-sise 4", "did you mean --e88.conv-size or --mamba2.conv-size"),
        # Also where the flag is missing for lack of it.
        (
            "--layout e88,attention --n-heads 8",
            "--n-heads: did you mean --e88.n-heads or --attention.n-heads?",
        ),
        ("--mixer attention --attention.n-heads 2", "did you mean --n-heads?"),
        # Mistyped.
        ("--layout e88,mamba2 --e88.n-haeds 8", "--e88.n-haeds: did you mean --e88.n-heads?"),
        ("--layout e88,mamba2 --mamba2.state 8", "did you mean --mamba2.d-state?"),
        ("--layout e88,mamba2 --e88n-heads 8", "did you mean --e88.n-heads?"),
        ("--layout e88,mamba2 --dimm 8", "--dimm: did you mean --dim?"),
        ("--layuot e88,mamba2", "--layuot: did you mean --layout?"),
        # A prefix without a layout.
        ("--e88.n-heads 8", "--e88.n-heads: did you mean --n-heads?"),
        ("--mixer mamba2 --mamba2.d-state 8", "did you mean --d-state?"),
        # A kind that no layer has.
        (
            "--attention.window 8",
            "--attention.window: it needs a layer of attention, as in --layout e88,attention.",
        ),
        ("--layout e88,mamba2 --gated-deltanet.n-heads 8", "--layout e88,mamba2,gated_deltanet."),
    ],
)
def test_unknown_flags_get_a_hint(flags: str, hint: str) -> None:
    said = refusal(flags)
    assert said.startswith("unknown argument --")
    assert hint in said


def help_of(flags: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The text of each group of the help, by its title."""
    with pytest.raises(SystemExit) as stopped:
        cli.parse(ByteLMConfig, [*flags, "--help"], complete=False)
    assert stopped.value.code == 0
    titles_and_texts = re.split(r"^\W+([\w.]+) options\W*\n", capsys.readouterr().out, flags=re.M)
    return dict(zip(titles_and_texts[1::2], titles_and_texts[2::2], strict=True))


def test_the_help_has_a_group_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    groups = help_of(["--layout", "attention,e88,attention"], capsys)
    assert [*groups][-4:] == ["model", "attention", "e88", "model.execution"]
    assert "One layer of causal softmax attention" in groups["attention"]
    for flag in ("--attention.n-heads INT", "--attention.qk-norm, --attention.no-qk-norm"):
        assert flag in groups["attention"]
    assert "--e88.n-state INT" in groups["e88"]
    assert "--mixer" not in groups["model"].replace("Instead of --mixer", "")
    assert "--layout KIND,KIND,..." in groups["model"]
    assert "--n-heads" not in "".join(groups.values())


def test_without_a_layout_the_help_is_that_of_the_mixer(capsys: pytest.CaptureFixture[str]) -> None:
    groups = help_of([], capsys)
    assert [*groups][-3:] == ["model", "model.layer", "model.execution"]
    assert "--n-heads INT" in groups["model.layer"]
    assert "--mixer {e88,gated_deltanet," in groups["model"]
    assert "--layout KIND,KIND,..." in groups["model"]
    flags = re.findall(r"(?<![\w-])--[\w.-]*\.[\w-]+ ", "".join(groups.values()))
    assert set(flags) <= {"--attention.n-heads "}  # the example


def test_the_help_imports_no_jax() -> None:
    program = (
        "import sys\nfrom experiments import train_byte_lm\n"
        "try: train_byte_lm.main(['--layout', 'e88,gated_deltanet,mamba2,attention,lstm', "
        "'--depth', '5', '--help'])\n"
        "finally: assert not {'jax', 'flax', 'orbax'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--gated-deltanet.n-heads" in done.stdout


def stored(directory: Path, *layers: Any, depth: int = 4) -> None:
    config = ByteLMConfig(model=LMConfig(dim=16, depth=depth, layers=layers), out=directory)
    (directory / "run.json").write_text(json.dumps({"config": config.to_dict()}))


HYBRID = E88Config(n_heads=2, n_state=4), AttentionConfig(n_heads=2, head_dim=4, window=32)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--e88.n-heads 2 --attention.window 32",
        "--layout e88,attention",
        "--layout e88,attention --e88.n-state=4",
    ],
)
def test_a_stored_hybrid_resumes_with_its_own_layers(tmp_path: Path, flags: str) -> None:
    stored(tmp_path, *HYBRID)
    assert model_of(f"--resume --out {tmp_path} {flags}").layers == HYBRID


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--attention.window 64", "--attention.window 32 (not 64): leave"),
        (
            "--e88.write-gate --attention.window None --dim 32",
            "--dim 16 (not 32), --e88.write-gate False (not True), --attention.window 32 (not None",
        ),
        ("--layout attention,e88", "--layout e88,attention (not attention,e88): leave"),
        ("--layout e88", "--layout e88,attention (not e88): leave"),
        ("--mixer e88", "--layout e88,attention (not e88): leave"),
        ("--mixer lstm --width 9", "--layout e88,attention (not lstm): leave"),
    ],
)
def test_other_layers_are_not_resumed(tmp_path: Path, flags: str, changes: str) -> None:
    stored(tmp_path, *HYBRID)
    said = refusal(f"--resume --out {tmp_path} {flags}")
    assert f"the run in {tmp_path} has another configuration, {changes}" in said


def test_a_stored_mixer_answers_for_its_required_flags(tmp_path: Path) -> None:
    layer = AttentionConfig(n_heads=2, head_dim=4)
    stored(tmp_path, layer)
    for flags in ("--mixer attention", "--layout attention", ""):
        assert model_of(f"--resume --out {tmp_path} {flags}").layers == (layer,)
    assert "--mixer attention (not e88)" in refusal(
        f"--resume --out {tmp_path} --mixer e88 --n-heads 2"
    )


def test_layers_of_one_kind_that_differ_have_no_flags(tmp_path: Path) -> None:
    layers = *HYBRID, E88Config(n_heads=3, n_state=4)
    stored(tmp_path, *layers)
    assert model_of(f"--resume --out {tmp_path} --layout e88,attention,e88").layers == layers
    assert "the model's layers of e88 differ, so that they have no flags." in refusal(
        f"--resume --out {tmp_path} --e88.n-heads 2"
    )
    assert "--attention.window 32 (not 64)" in refusal(
        f"--resume --out {tmp_path} --attention.window 64"
    )
