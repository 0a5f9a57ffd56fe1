"""Models of one budget, and `--compare` of the command line."""

import functools
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

from e88_jax import hardware, sizing
from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.baselines import AttentionConfig, GatedDeltaNetConfig, Mamba2Config
from e88_jax.sizing import Match, solve
from e88_jax.sizing import __main__ as command
from e88_jax.sizing.search import usual_depth

compare = functools.cache(sizing.compare)

BUDGETS = [25_000_000, 100_000_000, 500_000_000, 1_000_000_000, 1_300_000_000]
KINDS = [
    ("e88",),
    ("gated_deltanet",),
    ("mamba2",),
    ("attention",),
    ("e88", "e88", "e88", "attention"),
    ("gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"),
]


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert command.main([*args, "--compare", "--gpu", "h100"]) == 0
    return capsys.readouterr().out


def numbers(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    return json.loads(answer(capsys, *args, "--json"))


def by_kinds(matches: list[Match]) -> dict[tuple[str, ...], Match]:
    return {tuple(layer.kind for layer in x.config.layers): x for x in matches}


@pytest.mark.parametrize(
    ("budget", "gpu"),
    [*itertools.product(BUDGETS, (None, "h100")), (100_000_000, "rtx4090")],
)
def test_all_have_the_budget_within_half_a_percent(budget: int, gpu: str | None) -> None:
    matches = compare(budget, gpu=None if gpu is None else hardware.find_gpu(gpu))
    assert [tuple(layer.kind for layer in x.config.layers) for x in matches] == KINDS
    for match in matches:
        assert abs(match.config.count_params() / budget - 1) <= 0.005
        assert match.within
        assert match.params == match.config.count_params()
        assert match.config.depth % len(match.config.layers) == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_proportions_are_as_advised(budget: int) -> None:
    for kinds, match in by_kinds(compare(budget)).items():
        config = match.config
        dim, scale = config.dim, usual_depth(budget) / 20
        assert dim % 64 == 0 or (len(kinds) == 1 and kinds != ("attention",) and dim % 32 == 0)
        for layer in config.layers:
            match layer:
                case E88Config():
                    assert 1 / 1.2 <= dim / (layer.n_heads * layer.n_state) <= 1.2
                case GatedDeltaNetConfig():
                    assert (layer.head_dim, layer.value_dim) == (128, 256)
                    assert abs(layer.n_heads * 128 - 0.75 * dim) < 128
                case Mamba2Config():
                    assert layer.d_inner(dim) == 2 * dim
                    assert (layer.d_state, layer.head_dim) == (128, 64)
                case AttentionConfig():
                    assert layer.n_heads * layer.head_dim == dim
                case _:
                    raise AssertionError(layer)
        if kinds == ("attention",):
            assert config.channel_mixer_dim is not None
            assert config.channel_mixer_dim % 64 == 0
            assert abs(config.channel_mixer_dim - 8 / 3 * dim) <= 32
        else:
            assert config.channel_mixer_dim is None
        usual = {"gated_deltanet": 23, "mamba2": 32, "attention": 24}.get(kinds[0])
        if len(kinds) == 1 and usual is not None:
            assert 0.5 * usual * scale - 1 <= config.depth <= 1.5 * usual * scale + 1


def test_e88_is_the_first_row_that_is_near_enough() -> None:
    for budget in BUDGETS:
        gpu = hardware.find_gpu("h100")
        near = [x for x in solve(budget, gpu=gpu) if abs(x.error) <= 0.005]
        e88, *_ = compare(budget, gpu=gpu)
        assert e88.config == near[0].config


def test_vocabulary() -> None:
    for match in compare(500_000_000, vocab_size=32_000):
        assert match.config.vocab_size == 32_000
        assert abs(match.config.count_params() / 500e6 - 1) <= 0.005


def test_what_cannot_be_had_is_the_nearest() -> None:
    far = [x for x in compare(1_000_000) if not x.within]
    assert far
    for match in far:
        assert abs(match.error) > 0.005
        assert abs(match.error) < 0.3


def a_match(*layers: Any, **sizes: Any) -> Match:
    config = LMConfig(**{"dim": 128, "depth": 4, **sizes}, layers=layers)
    return Match("family", config, 1, 1, 0.0)


def test_state_of_a_sequence() -> None:
    e88 = E88Config(n_heads=3, n_state=4, expansion=2.0)
    hybrid = a_match(e88, e88, e88, AttentionConfig(n_heads=8, head_dim=16, n_kv_heads=2))
    assert hybrid.states(100) == {"e88": 3 * 4 * 8, "attention": 2 * 2 * 16 * 100}
    assert hybrid.state(100) == 3 * 96 + 6400
    windowed = a_match(AttentionConfig(n_heads=8, head_dim=16, window=30))
    assert windowed.states(100) == {"attention": 2 * 8 * 16 * 30}
    assert windowed.states(20) == {"attention": 2 * 8 * 16 * 20}
    assert a_match(Mamba2Config()).state(5) == a_match(Mamba2Config()).state(7) == 4 * 256 * 128


def test_sizes_in_words() -> None:
    e88, attention = E88Config(n_heads=3, n_state=4, expansion=2.0), AttentionConfig(n_heads=2)
    assert a_match(e88, attention).sizes == "3 heads of 4 x 8, 2 heads of 64"
    assert a_match(Mamba2Config()).sizes == "4 heads of 128 x 64"
    assert a_match(GatedDeltaNetConfig(n_heads=1)).sizes == "1 head of 256 x 512"
    transformer = a_match(attention, channel_mixer_dim=320)
    assert transformer.sizes == "2 heads of 64, SwiGLU 320"


def test_the_command_prints_a_row_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    about, header, *lines = answer(capsys, "500M").splitlines()
    assert about.startswith("H100: ")
    assert "batch 8, length 2048" in about
    assert "state at 2,048" in header
    assert "tokens/s" not in header
    for match, line in zip(
        compare(500_000_000, gpu=hardware.find_gpu("h100")), lines, strict=False
    ):
        assert line.strip().startswith(match.family)
        assert f"{match.params:,}" in line
        assert f"{match.error:+.2%}" in line
        assert match.sizes in line
    text = "\n".join(lines)
    assert "409,600 numbers of state a layer, 5.6 times h72n32's and 2.5 times h40n64's" in text
    assert "393,216 numbers of state a layer, 5.3 times h72n32's and 2.4 times h40n64's" in text
    assert "SwiGLU of 8/3 dim" in text
    assert "is within" not in text


def test_json_has_models_that_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "100M", "--batch-size", "2", "--seq-len", "512")
    assert found["budget"] == 100_000_000
    assert (found["gpu"], found["batch_size"], found["seq_len"]) == ("h100", 2, 512)
    assert found["measured_on"] is None
    matches = compare(100_000_000, gpu=hardware.find_gpu("h100"))
    for row, match in zip(found["models"], matches, strict=True):
        config = LMConfig.from_dict(row["config"])
        assert config == match.config
        assert row["params"] == config.count_params()
        assert row["within"]
        flops = config.flops_per_token()
        assert row["matmul_flops_per_token"] == flops.matmul
        assert row["recurrence_flops_per_token"] == flops.recurrence
        assert row["state"] == match.state(512)
        assert row["state_over_e88"] == round(match.state(512) / matches[0].state(512), 2)
        assert "tokens_per_second" not in row
    assert found["models"][0]["state_over_e88"] == 1


def test_it_says_what_is_not_within(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "1M")
    for match in compare(1_000_000, gpu=hardware.find_gpu("h100")):
        sentence = (
            f"No {match.family} is within 0.5% of the budget: the nearest has {match.params:,} "
            f"parameters, {match.error:+.2%}."
        )
        assert (sentence in out) == (not match.within)


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--compare"], ["500M", "--check", "--presets"]),
        (["5M", "--measure"], ["--measure goes with --compare"]),
        (["--presets", "--measure"], ["--measure goes with --compare"]),
        (["--presets", "--compare"], ["--compare does not go with --presets"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "--compare"], ["--compare", "--check"]),
        (["5M", "--compare", "--depth", "3"], ["--depth does not go with --compare"]),
        (["5M", "--compare", "--n-state", "32"], ["--n-state does not go with --compare"]),
        (["5M", "--compare", "--gate", "none"], ["--gate does not go with --compare"]),
        (["5M", "--compare", "--rows", "2"], ["--rows does not go with --compare"]),
        (["5M", "--compare", "--seq-len", "0"], ["--seq-len", "0"]),
        (["5", "--compare"], ["1M to 10B", "5"]),
        (["5M", "--compare", "--measure"], ["--measure times training steps on a GPU, got cpu."]),
    ],
)
def test_mistakes_are_one_sentence(
    args: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    for fragment in fragments:
        assert fragment in printed.err


def test_it_imports_no_jax() -> None:
    program = (
        "import sys; from e88_jax.sizing import __main__ as command\n"
        "command.main(['25M', '--compare', '--gpu', 'h100'])\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
