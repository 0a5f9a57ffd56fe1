"""The training loop around its steps."""

from pathlib import Path
from typing import Any

import pytest

from experiments.harness import loop
from experiments.harness.config import TrainConfig


def test_weights_that_are_not_finite_give_a_warning_and_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise ValueError("the logits of row 0 are not finite.")

    monkeypatch.setattr(loop, "generate", generate)
    model: Any = None
    loop._sample(model, TrainConfig(), tmp_path, model)
    assert capsys.readouterr().err == "warning: no sample: the logits of row 0 are not finite.\n"
    assert not list(tmp_path.iterdir())
