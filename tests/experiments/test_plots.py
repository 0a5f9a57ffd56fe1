"""The plot of a run."""

from pathlib import Path

import pytest

from experiments.harness.plots import plot_loss

METRICS = '{"kind": "validation", "step": 1, "bits_per_byte": 2.5}\n'


def test_a_plot_in_place_of_the_one_before(tmp_path: Path) -> None:
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text(METRICS)
    image.write_text("before")
    plot_loss(metrics, image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [image, metrics]


def test_a_plot_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text(METRICS)
    (tmp_path / "loss.png.partial").symlink_to("/dev/full")
    plot_loss(metrics, image)
    assert "loss.png is not drawn: [Errno 28] No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [metrics]
