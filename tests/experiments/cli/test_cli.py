import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli
from experiments.tasks.bytes import ByteLMConfig

PROGRAM = Path(__file__).parents[3] / "experiments" / "train_byte_lm.py"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dim", "many"], "Error parsing --dim: invalid literal for int() with base 10: 'many'"),
        (
            ["--optimizer", "sgd"],
            "invalid choice 'sgd' for argument '--optimizer'. Expected one of ('adamw', "
            "'schedule_free', 'muon').",
        ),
    ],
)
def test_one_sentence_whatever_the_terminal_can_draw(
    flags: list[str], sentence: str, encoding: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"train_byte_lm.py: {sentence}\n"


def test_help_needs_no_wide_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fewer columns than a word has, tyro's layout does not end."""
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(SystemExit) as stopped:
        cli.parse(ByteLMConfig, ["--help"])
    assert stopped.value.code == 0
    frame = capsys.readouterr().out.splitlines()[-1]
    assert len(frame) == cli.MIN_COLUMNS
    assert os.environ["COLUMNS"] == "20"
