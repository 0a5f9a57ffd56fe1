"""The program for synthetic tasks: tiny runs and command lines, in this process."""

import json
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import train_synthetic
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness import program
from experiments.harness.metrics import read_metrics
from experiments.harness.run import Run
from experiments.harness.run_directory import load_config
from experiments.tasks.base import Batch
from experiments.tasks.synthetic import TASKS, Counter, Dyck, MultiQuery, SyntheticConfig
from experiments.tasks.synthetic.base import Synthetic
from experiments.train_synthetic import SyntheticTrainConfig
from experiments.trained import load_trained

BATCH = ["--seq-len", "8", "--batch-size", "4"]
STEPS = ["--steps", "6", "--eval-every", "2", "--save-every", "2", "--log-every", "1"]
TINY = ["--dim", "16", "--n-heads", "2", "--n-state", "4", "--depth", "1", *BATCH, *STEPS]
COUNTER = ["--task", "counter", "--modulus", "3", *TINY]

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("synthetic") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        train_synthetic.main([*COUNTER, "--out", str(out)])
    return out


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def parse(line: str) -> SyntheticTrainConfig:
    return program.parse_args(SyntheticTrainConfig, line.split())


def test_a_run_writes_its_accuracy(whole: Path) -> None:
    validation = [record for record in records(whole) if record["kind"] == "validation"]
    training = [record for record in records(whole) if record["kind"] == "train"]
    assert [record["step"] for record in validation] == [2, 4, 6]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    for record in (*validation, *training):
        assert 0 < record["accuracy"] < 1
        assert record["accuracy"] * 16 * 4 * 8 % 1 == 0  # batches, rows, positions
    assert np.isfinite([record["loss"] for record in training]).all()
    described = json.loads((whole / "run.json").read_text())
    metric = {"name": "accuracy", "unit": "accuracy", "better": "higher"}
    assert described["metric"] == metric
    assert described["config"]["task_name"] == "counter"
    assert described["config"]["task"] == {"answers": "all", "min_length": None, "modulus": 3}
    assert (whole / "loss.png").exists()


@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,heads=2"])
def test_divided_weights_are_read_where_they_are(whole: Path, tmp_path: Path, mesh: str) -> None:
    """They read as the copies of a run on four devices do."""
    train_synthetic.main([*COUNTER, "--out", str(tmp_path / "run"), "--mesh", mesh])
    divided, copies = (
        json.loads((run / "lengths.json").read_text()) for run in (tmp_path / "run", whole)
    )
    assert divided.keys() == copies.keys()
    for length, read in divided.items():
        assert read["chance"] == copies[length]["chance"]
        assert abs(read["accuracy"] - copies[length]["accuracy"]) < 0.01


def test_it_resumes_bit_for_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    read = Synthetic.__getitem__

    def interrupt(task: Synthetic, step: int) -> Batch:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return read(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(Synthetic, "__getitem__", interrupt)
        with pytest.raises(RunStopped, match="stopped by SIGINT at step") as ended:
            train_synthetic.main([*COUNTER, "--out", str(out)])
    assert ended.value.exit_code == 128 + signal.SIGINT
    stopped = max(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))
    assert 0 < stopped < 6
    train_synthetic.main(["--out", str(out), "--resume"])
    leaves = [
        jax.tree.leaves(nnx.state(load_trained(run, SyntheticTrainConfig, latest=True)[0]))
        for run in (whole, out)
    ]
    for expected, ours in zip(*leaves, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert records(out) == records(whole)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--task parity", "another configuration, --task counter (not parity): leave those flags"),
        ("--task counter --modulus 4", "another configuration, --modulus 3 (not 4)"),
        ("--modulus 4", "another configuration, --modulus 3 (not 4)"),
        ("--answers last", "another configuration, --answers all (not last)"),
        ("--min-length 2", "another configuration, --min-length None (not 2)"),
        ("--seq-len 9 --seed 1", "another configuration, --seq-len 8 (not 9), --seed 0 (not 1)"),
        ("--kinds 2", "unknown argument --kinds"),
        ("--steps 5", "has done 6 steps: raise --steps."),
    ],
)
def test_another_task_is_not_resumed(whole: Path, flags: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        train_synthetic.main(["--out", str(whole), "--resume", *flags.split()])
    assert sentence in str(error.value)


def test_a_finished_run_says_what_it_is_without_flags(whole: Path) -> None:
    config = parse(f"--out {whole} --resume --task counter --steps 9")
    assert (config.task, config.steps) == (Counter(modulus=3), 9)
    assert load_config(whole, SyntheticTrainConfig).task == Counter(modulus=3)


def test_another_mixer_and_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--task mqar --n-tokens 12 --lengths 4 8 --pairs 1 2 --shares 1 2.5"
    model = "--mixer lstm --width 8 --dim 8 --depth 1 --steps 2 --eval-every 2"
    out, counted, stepped = tmp_path / "run", list[int](), Run.stepped

    def count(run: Run, metrics: Any, n_tokens: int) -> None:
        counted.append(n_tokens)
        stepped(run, metrics, n_tokens)

    monkeypatch.setattr(Run, "stepped", count)
    train_synthetic.main([*flags.split(), *model.split(), *BATCH, "--out", str(out)])
    assert counted == [4 * 8] * 2  # tokens, of which some have answers
    (validation,) = (record for record in records(out) if record["kind"] == "validation")
    assert 0 <= validation["accuracy"] <= 1
    expected = MultiQuery(n_tokens=12, lengths=(4, 8), pairs=(1, 2), shares=(1.0, 2.5))
    config = load_config(out, SyntheticTrainConfig)
    assert (config.task, config.model.vocab_size) == (expected, 12)


@pytest.mark.parametrize("task", TASKS)
def test_the_vocabulary_is_the_tasks(task: str) -> None:
    config = parse(f"--task={task}")
    assert config.task == TASKS[task]()
    assert config.model.vocab_size == config.task.vocab_size
    assert config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        ("", TASKS["parity"]()),
        ("--modulus 7 --task counter --min-length 3", Counter(modulus=7, min_length=3)),
        ("--task counter --task dyck --kinds 5", Dyck(kinds=5)),
    ],
)
def test_the_vocabulary_follows_the_tasks_flags(flags: str, task: SyntheticConfig) -> None:
    config = parse(flags)
    assert (config.task, config.model.vocab_size) == (task, task.vocab_size)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--task dyck --knids 2", "unknown argument --knids: did you mean --kinds?"),
        ("--task counter --kinds 2", "unknown argument --kinds: it needs --task dyck."),
        ("--modulus 3", "unknown argument --modulus: it needs --task counter or arithmetic."),
        ("--task counter --modulis 3", "unknown argument --modulis: did you mean --modulus?"),
        ("--task dick", "invalid choice 'dick' for argument '--task'. Expected one of ('parity',"),
        ("--task dyck --kinds 0", "--kinds must be at least 1, got 0."),
        ("--task group --group A5 --tokens swaps", "--tokens swaps are not elements of --group A5"),
        ("--task copy --seq-len 16", "--seq-len: 16 is too short for --copied 8 tokens, GO"),
        ("--task mqar --lengths 64", "--lengths, --pairs and --shares need as many values each"),
        ("--task counter --vocab-size 9", "--vocab-size must be 5, the vocabulary of the task's"),
        ("--stateful", "--stateful continues sequences from step to step"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, flags: str, sentence: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError) as error:
        train_synthetic.main([*flags.split(), "--out", str(out)])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_help_is_that_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_synthetic.main(["--task", "dyck", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--kinds INT", "--max-depth INT", "--min-length", "Random well-nested brackets"):
        assert words in text
    for flag in ("--modulus", "--copied", "--pairs", "--group", "--density", "--brackets"):
        assert flag not in text
    assert "256 for bytes. (default: 9)" in text
