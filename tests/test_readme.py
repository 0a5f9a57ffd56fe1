"""The README's training loop runs as printed."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def test_training_loop(capsys: pytest.CaptureFixture[str]):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        exec(compile(snippet, str(README), "exec"), names)
    printed = capsys.readouterr().out
    (loss,) = re.findall(r"loss ([\d.]+) nats", printed)
    assert float(loss) < 3.3  # 5.5 untrained
    assert re.search(r"^b['\"]", printed, re.MULTILINE)
