"""Attention and LSTM train from the command line and write text; attention resumes bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from experiments import sample, train_byte_lm


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        yield


# What resumes is of the trainer, and of the state that attention carries from step to step.
@pytest.mark.parametrize(
    ("flags", "resumes"),
    [
        (["--mixer", "attention", "--n-heads", "2", "--head-dim", "8", "--stateful"], True),
        (["--mixer", "lstm", "--width", "16", "--optimizer", "muon"], False),
    ],
    ids=["attention", "lstm"],
)
def test_train_resume_and_sample(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], flags: list[str], resumes: bool
) -> None:
    data = tmp_path / "text"
    data.write_bytes(b"abcdefgh" * 500)
    flags = [*flags, "--data", str(data), "--dim", "16", "--depth", "1", "--seq-len", "16"]
    flags += ["--batch-size", "4", "--log-every", "2", "--eval-every", "4", "--save-every", "2"]
    flags += ["--eval-bytes", "128", "--sample-bytes", "8"]
    # A rate that does not depend on the number of steps.
    flags += ["--learning-rate", "0.02", "--warmup-steps", "0", "--final-lr-fraction", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def losses(run: Path) -> list[float]:
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["kind"] == "train"]

    train_byte_lm.main([*flags, "--out", str(whole), "--steps", "8"])
    first, *_, last = losses(whole)
    assert last < first - 0.1
    if resumes:
        train_byte_lm.main([*flags, "--out", str(parts), "--steps", "4"])
        train_byte_lm.main(["--out", str(parts), "--resume", "--steps", "8"])
        assert losses(parts) == losses(whole)
    capfdbinary.readouterr()
    # Longer than the window that the model was trained on.
    sample.main([str(whole), "--prompt", "abc", "--length", "50"])
    assert len(capfdbinary.readouterr().out.removeprefix(b"abc").rstrip(b"\n")) >= 50
