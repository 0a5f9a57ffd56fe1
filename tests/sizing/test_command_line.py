import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from e88_jax import hardware
from e88_jax.sizing import PRESETS, training_memory
from e88_jax.sizing import __main__ as command
from tests.reference.configs import lm_config

BUDGET = ["500M", "--gpu", "h100"]


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert command.main(args) == 0
    return capsys.readouterr().out


def sizes_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("dim", "n_heads", "n_state", "depth")}


def test_it_answers_in_under_a_second_without_jax() -> None:
    program = (
        "import runpy, sys; sys.argv = ['sizing', *sys.argv[1:]]\n"
        "try: runpy.run_module('e88_jax.sizing', run_name='__main__')\n"
        "finally: assert 'jax' not in sys.modules"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *BUDGET], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - began < 1
    assert "balanced" in done.stdout


def test_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    about, header, *rows = answer(capsys, *BUDGET, "--rows", "3").splitlines()
    sizes = "n_state 32, 48, 64, 96, 128 (measured), 64 to 96 published"
    assert about.startswith(f"H100: {sizes}, 80 GB.")
    assert "training GB" in header
    assert len(rows) == 3
    for row in rows:
        count = next(int(w.replace(",", "")) for w in row.split() if w.count(",") == 2)
        assert abs(count / 500e6 - 1) <= 0.01


def test_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["7B", "--gpu", "h100", "--n-state", "32", "--rows", "1", "--batch-size", "16"]
    one, four = (answer(capsys, *budget, *more) for more in ([], ["--fsdp", "4"]))
    assert "Training GB: of each of 4 GPUs (--mesh fsdp=4), batch 16 over all, length" in four
    assert "GB of each of 4 GPUs at batch 16" in four
    assert "(--mesh fsdp=2)" in one
    found = json.loads(answer(capsys, *budget, "--fsdp", "4", "--json"))
    assert found["fsdp"] == 4
    (row,) = found["configurations"]
    (alone,) = json.loads(answer(capsys, *budget, "--json"))["configurations"]
    assert row["training_bytes"] < alone["training_bytes"] / 2
    options = "500M", "--compare", "--gpu", "h100", "--json"
    whole, part = (json.loads(answer(capsys, *options, *x)) for x in ((), ("--fsdp", "2")))
    for model, divided in zip(whole["models"], part["models"], strict=True):
        assert 0.45 < divided["training_bytes"] / model["training_bytes"] < 0.65


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, *BUDGET, "--json", "--depth", "20", "--n-state", "32"))
    assert found["gpu"] == "h100"
    (row,) = found["configurations"]
    assert (row["depth"], row["n_state"]) == (20, 32)
    assert abs(row["params"] / 500e6 - 1) <= 0.01
    assert row["balance"] == "balanced"


def test_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["dim=8192", "n_heads=20", "n_state=32", "depth=20"]
    out = answer(capsys, "--check", *bad, "--gpu", "rtx4090")
    assert "few heads for a large dim, dim / d_inner is 12.8" in out
    assert "take 256 heads" in out
    good = ["dim=64", "n_heads=2", "depth=1", "output_gate=none"]
    out = answer(capsys, "--check", *good, "--gpu", "h100")
    assert "Nothing to change." in out


def test_options_of_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    words = "dim=64 n_heads=2 depth=3 conv_size=none write_gate=true expansion=2 vocab_size=99"
    row = json.loads(answer(capsys, "--check", *words.split(), "--json"))["configurations"][0]
    sizes = {"dim": 64, "n_heads": 2, "n_state": 32, "depth": 3, "vocab_size": 99}
    options: dict[str, Any] = {"write_gate": True, "expansion": 2.0}
    assert row["params"] == lm_config(**sizes, **options).count_params()


def test_options_of_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--vocab-size 32000 --gate none --depth 18 --n-state 48 --rows 2"
    rows = json.loads(answer(capsys, *BUDGET, *words.split(), "--json"))["configurations"]
    assert 1 <= len(rows) <= 2
    for row in rows:
        assert (row["depth"], row["n_state"]) == (18, 48)
        config = lm_config(**sizes_of(row), output_gate="none", vocab_size=32_000)
        assert row["params"] == config.count_params()
        memory = training_memory(config, 8, 2048)
        assert row["training_bytes"] == memory.total


def test_the_batch_of_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*BUDGET, "--rows", "1", "--json", "--batch-size", "3", "--seq-len", "100"]
    (row,) = json.loads(answer(capsys, *words))["configurations"]
    config = lm_config(**sizes_of(row))
    assert row["training_bytes"] == training_memory(config, 3, 100).total


def test_the_gpu_asked_for_else_the_one_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def n_states(*words: str) -> set[int]:
        rows = json.loads(answer(capsys, "500M", "--json", *words))["configurations"]
        return {row["n_state"] for row in rows}

    monkeypatch.setattr(hardware, "detect_gpu", lambda: hardware.find_gpu("rtx4090"))
    assert n_states() == {32, 48, 64, 96}
    assert n_states("--gpu", "l40s") == {64, 96, 128}
    out = answer(capsys, "500M", "--batch-size", "64", "--rows", "1")
    assert "lax.scan" not in out
    assert "GB at batch 64 and length 2048, of 24 GB" in out


def test_a_predicted_n_state_stands_beside_the_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    about = answer(capsys, "500M", "--gpu", "rtx4090").splitlines()[0]
    sizes = "n_state 32, 48, 64, 96, 128 (predicted), 32 to 48 published"
    assert about.startswith(f"RTX 4090: {sizes}, 24 GB.")
    about = answer(capsys, "500M", "--gpu", "l40s").splitlines()[0]
    assert about.startswith("L40S: n_state 64, 96, 128 (predicted), 48 GB.")


def test_names_of_several_checks_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "--check", "dim=64", "--check", "n_heads=2", "depth=1", "--gpu", "h100")
    assert "Nothing to change." in out


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "--presets")
    for name, preset in PRESETS.items():
        (row,) = (line for line in out.splitlines() if line.split()[0] == name)
        assert preset.published in row
        assert f"{preset.formula_params / 1e6:,.1f}M" in row
        assert f"{preset.config.count_params() / 1e6:,.1f}M" in row
        assert (str(preset.corrected_dim) in row) == (not preset.agrees)
    mamba2, gated_deltanet = out.splitlines()[-2:]
    assert mamba2 == (
        "mamba2-500m, Mamba2 at 500M: 409,600 numbers of state a layer, 5.6 times h72n32's and 2.5 "
        "times h40n64's"
    )
    assert gated_deltanet == (
        "gated-deltanet-500m, Gated DeltaNet at 500M: 393,216 numbers of state a layer, 5.3 times "
        "h72n32's and 2.4 times h40n64's"
    )
    rows = json.loads(answer(capsys, "--presets", "--json"))
    assert [row["name"] for row in rows] == [*PRESETS]


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ([], ["500M", "--check", "--presets"]),
        (["500M", "--presets"], ["--check"]),
        (["-5M"], ["1M to 10B", "-5,000,000"]),
        (["many"], ["500M", "'many'"]),
        (["5M", "--gpu", "gtx"], ["'gtx'", "h100"]),
        (["5M", "--n-state", "30"], ["multiple of 4", "30"]),
        (["5M", "--depth", "x"], ["--depth", "'x'"]),
        (["5M", "--rows", "0"], ["--rows", "0"]),
        (["5M", "--colour"], ["--colour"]),
        (["--check", "dim=64"], ["n_heads, depth"]),
        (["--check", "dims=64"], ["'dims=64'", "n_heads"]),
        (["--check", "dim=x", "n_heads=1", "depth=1"], ["dim", "whole number", "'x'"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "write_gate=3"], ["true or false", "'3'"]),
        (["--check", "dim=0", "n_heads=1", "depth=1"], ["dim", "at least 1", "0"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "dim=8"], ["dim twice"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "expansion=1e400"], ["expansion", "inf"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "expansion=nan"], ["expansion", "nan"]),
        (["--check", "dim=8", "n_heads=1", "depth=9e9"], ["depth", "whole number", "'9e9'"]),
        (["--check", "dim=8", "n_heads=1", f"depth={2**31}"], ["depth", "2,147,483,647"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "--depth", "2"], ["--depth", "--check"]),
        (["--check", "dim=8", "n_heads=1", "depth=1", "--gate", "none"], ["--gate", "--check"]),
        (["--presets", "--gpu", "h100"], ["--gpu does not go with --presets"]),
        (["--presets", "--rows", "3"], ["--rows does not go with --presets"]),
        (["--presets", "--fsdp", "2"], ["--fsdp does not go with --presets"]),
        (["500M", "--fsdp", "0"], ["--fsdp must be at least 1, got 0"]),
        (["500M", "--gpu", "h100", "--fsdp", "3"], ["batch 8", "fsdp=2 or 4 would do"]),
        (["500M", "--compare", "--measure", "--fsdp", "2"], ["--measure times on one GPU"]),
        (["0"], ["1M to 10B", "0"]),
        (["nan"], ["500M", "'nan'"]),
        (["1e400"], ["500M", "'1e400'"]),
        (["9" * 400], ["500M", "999..."]),
        (["5 M"], ["500M", "'5 M'"]),
        ([""], ["500M", "''"]),
        (["5M", "--gpu", ""], ["unknown GPU ''", "h100"]),
        (["5M", "--batch-size", "9" * 30], ["batch", "2,147,483,647", "999"]),
        (["5M", "--seq-len", "nan"], ["--seq-len", "'nan'"]),
        (["5M", "--vocab-size", str(2**31)], ["vocab_size", "2147483648"]),
        (["5M", "6M"], ["6M"]),
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


@pytest.mark.parametrize("reader", ["gone", "a full disk"])
def test_output_that_cannot_be_written(reader: str) -> None:
    """No traceback; that nobody reads any more needs no sentence."""
    if reader == "gone":
        read_end, out = os.pipe()
        os.close(read_end)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    program = [sys.executable, "-m", "e88_jax.sizing", "--presets"]
    done = subprocess.run(program, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert done.returncode == (141 if reader == "gone" else 2)
    assert len(done.stderr.splitlines()) == (reader != "gone")
    assert ("No space left on device" in done.stderr) == (reader != "gone")
