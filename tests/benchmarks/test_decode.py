"""The program that times prefill and decoding, on a model that a CPU does at once."""

import json
from pathlib import Path

import pytest

from benchmarks import decode
from experiments.cli.errors import UsageError

TINY = ["--dim", "16", "--n-heads", "2", "--n-state", "4", "--depth", "1"]


def test_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers.json"
    flags = ["--batch-sizes", "1", "2", "--prompt", "4", "--context", "100", "--repeats", "1"]
    decode.main([*flags, *TINY, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 1, 2]
    assert [row["context"] for row in rows] == [4, 100, 4]
    for row in rows:
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
    assert capsys.readouterr().out.count("tokens read: prefill") == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--prompt 0", "--prompt must be at least 1, got 0"),
        ("--batch-sizes 3 -1", "--batch-sizes must be at least 1, got -1"),
        ("--json no/such/file", "no/such/file cannot be written"),
        ("--preset x", "unknown preset 'x'"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        decode.main(flags.split())
