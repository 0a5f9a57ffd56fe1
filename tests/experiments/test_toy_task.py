"""A task defined here and nowhere else trains, resumes, keeps its best and is plotted."""

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from matplotlib.axes import Axes
from matplotlib.image import imread

from experiments.cli import require
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness import program
from experiments.harness.config import BatchConfig, TrainConfig
from experiments.harness.metrics import plot_metric, read_metrics
from experiments.harness.run import Run
from experiments.tasks.base import Batch, Metric, TaskConfig
from experiments.trained import load_trained


def is_hit(logits: Array, targets: Array) -> Array:
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviousConfig(TaskConfig):
    """Predict the token before, up to a step from which on another rule is taught."""

    until: int = 60
    """Step from which on the target is the token itself."""
    note: str = "done"
    """Text of the file that is written at the end."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"note"})
    FILES: ClassVar[tuple[str, ...]] = ("rule.txt",)

    def __post_init__(self) -> None:
        require(self, "until", minimum=1)

    def open(self, batch: BatchConfig, resumed: Path | None) -> "Previous":
        if resumed is not None and not (resumed / "rule.txt").exists():
            raise UsageError(f"{resumed} has no rule.txt.")
        return Previous(self, batch)


class Previous:
    vocab_size = 11
    metric = Metric("accuracy", "of targets right", "higher", per_target=is_hit)
    tokens = "tokens"

    def __init__(self, config: PreviousConfig, batch: BatchConfig):
        self.config, self.batch = config, batch

    def _batch(self, key: tuple[int, ...], shape: tuple[int, int], *, previous: bool) -> Batch:
        rng = np.random.default_rng(key)
        inputs = rng.integers(self.vocab_size, size=(*shape, self.batch.seq_len), dtype=np.int32)
        weights = np.ones(inputs.shape, np.float32)
        weights[..., 0] = 0  # there is no token before the first
        return Batch(inputs, np.roll(inputs, previous, axis=-1), weights, restart=True)

    def __getitem__(self, step: int) -> Batch:
        key = self.batch.seed, step
        return self._batch(key, self.batch.shape, previous=step < self.config.until)

    def validation(self) -> Sequence[Batch]:
        return [self._batch((1, 2, i), (1, self.batch.batch_size), previous=True) for i in range(3)]

    def fingerprint(self) -> str:
        return f"previous-{self.config.until}"

    def describe(self) -> str:
        return "tokens without end"

    def write(self, directory: Path) -> None:
        (directory / "rule.txt").write_text("the token before")

    def finish(self, model: Any, run: Run) -> None:
        logits, _ = nnx.jit(model)(jnp.zeros((1, 3), jnp.int32))
        run.write("note.txt", f"{self.config.note} {logits.shape[-1]}".encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(TrainConfig):
    """Train on the token before."""

    task: PreviousConfig = PreviousConfig()


pytestmark = pytest.mark.usefixtures("compile_once")

FLAGS = [
    *"--dim 32 --n-heads 2 --n-state 8 --depth 1 --vocab-size 11 --seq-len 12".split(),  # noqa: SIM905
    *"--batch-size 16 --steps 90 --log-every 10 --eval-every 15 --save-every 20".split(),  # noqa: SIM905
    *"--keep 1 --learning-rate 2e-2 --warmup-steps 5".split(),  # noqa: SIM905
]


def train(out: Path, *flags: str) -> None:
    program.main(ToyConfig, [*FLAGS, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("toy") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        train(out)
    return out


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run / "metrics.jsonl")
        if record["kind"] == kind
    ]


def test_it_learns_and_keeps_its_best_and_its_newest(whole: Path):
    accuracy = {record["step"]: record["accuracy"] for record in records(whole, "validation")}
    assert list(accuracy) == [15, 30, 45, 60, 75, 90]
    best = max(accuracy, key=lambda step: accuracy[step])
    assert best in (45, 60)
    assert accuracy[best] > 0.5 > 0.25 > accuracy[90]
    kept = {int(path.name) for path in (whole / "checkpoints").glob("[0-9]*")}
    assert kept == {best, 90}
    assert load_trained(whole, ToyConfig, latest=False)[1] == best
    assert load_trained(whole, ToyConfig, latest=True)[1] == 90
    training = records(whole, "train")
    assert training[5]["accuracy"] == pytest.approx(accuracy[60], abs=0.15)
    assert all(0 <= record["accuracy"] <= 1 for record in training)
    assert (whole / "note.txt").read_text() == "done 11"
    described = json.loads((whole / "run.json").read_text())
    metric = {"name": "accuracy", "unit": "of targets right", "better": "higher"}
    assert described["metric"] == metric
    assert "tokens_per_second" in read_metrics(whole / "metrics.jsonl")[0]


def test_it_resumes_bit_for_bit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    read = Previous.__getitem__

    def interrupt(task: Previous, step: int) -> Batch:
        if step == 50:
            signal.raise_signal(signal.SIGTERM)
        return read(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(Previous, "__getitem__", interrupt)
        with pytest.raises(RunStopped, match="stopped by SIGTERM at step"):
            train(out)
    stopped = max(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))
    assert stopped < 90
    program.main(ToyConfig, ["--out", str(out), "--resume", "--note", "again"])
    leaves = [
        jax.tree.leaves(nnx.state(load_trained(run, ToyConfig, latest=True)[0]))
        for run in (whole, out)
    ]
    for expected, ours in zip(*leaves, strict=True):
        np.testing.assert_array_equal(ours, expected)
    for kind in ("train", "validation"):
        assert records(out, kind) == records(whole, kind)
    assert (out / "note.txt").read_text() == "again 11"
    with pytest.raises(UsageError, match=r"another configuration, --until 60 \(not 61\)"):
        program.main(ToyConfig, ["--out", str(out), "--resume", "--until", "61"])


def test_it_is_plotted(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Any] = {}

    def annotate(axes: Axes, text: str, *_: Any, **__: Any) -> None:
        drawn.update(unit=axes.get_ylabel(), text=text, lines=len(axes.lines))

    assert imread(whole / "loss.png").std() > 0.05
    monkeypatch.setattr(Axes, "annotate", annotate)
    (tmp_path / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    plot_metric(tmp_path, Previous.metric)
    best = max(records(whole, "validation"), key=lambda record: record["accuracy"])
    assert drawn == {
        "unit": "of targets right",
        "text": f"best {best['accuracy']:.3f} at step {best['step']}",
        "lines": 2,
    }


def test_its_mistakes(tmp_path: Path):
    out = str(tmp_path / "out")
    for flags, sentence in (
        (
            ["--vocab-size", "12"],
            "--vocab-size must be 11, the vocabulary of the task's tokens; got 12.",
        ),
        (["--until", "0"], "--until must be at least 1, got 0."),
    ):
        with pytest.raises(UsageError) as error:
            program.main(ToyConfig, [*FLAGS, "--out", out, *flags])
        assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()
