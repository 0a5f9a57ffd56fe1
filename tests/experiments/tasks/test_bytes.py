"""Byte language modelling: the windows of each step, validation, the sample."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import e88_jax.sampling
from experiments.cli.errors import UsageError
from experiments.harness.config import BatchConfig
from experiments.harness.train import prefetch
from experiments.tasks import bytes as bytes_
from experiments.tasks import corpus as corpus_
from experiments.tasks.base import Batch, DataError, rows_of
from experiments.tasks.bytes import Bytes, BytesConfig
from experiments.tasks.corpus import Corpus, split


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Bytes 0 to 99 in files of 10, 60 and 30 bytes."""
    everything = np.arange(100, dtype=np.uint8).tobytes()
    for name, start, stop in (("a", 0, 10), ("c", 10, 70), ("d", 70, 100)):
        (tmp_path / f"{name}.bin").write_bytes(everything[start:stop])
    return Corpus.of([str(tmp_path)])


def windows_of(batch: Batch) -> np.ndarray:
    """Inputs and the byte after each window, of which the targets are all but the first."""
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    assert inputs.shape == targets.shape
    assert batch.weights is None
    np.testing.assert_array_equal(inputs[..., 1:], targets[..., :-1])
    return np.concatenate([inputs, targets[..., -1:]], axis=-1)


def test_random_windows(corpus: Corpus):
    windows = bytes_.RandomWindows(corpus, (2, 3), seq_len=7, seed=5)
    batch = windows[11]
    assert batch.restart
    assert batch.inputs.shape == (2, 3, 7)
    assert batch.inputs.dtype == np.uint8
    steps = np.diff(windows_of(batch).astype(int), axis=-1)
    np.testing.assert_array_equal(steps, np.ones_like(steps))  # consecutive bytes of the corpus
    np.testing.assert_array_equal(windows_of(batch), windows_of(windows[11]))
    assert not np.array_equal(windows_of(batch), windows_of(windows[12]))
    other_seed = bytes_.RandomWindows(corpus, (2, 3), seq_len=7, seed=6)
    assert not np.array_equal(windows_of(batch), windows_of(other_seed[11]))


def test_seeds_and_steps_share_no_batch(corpus: Corpus):
    batches = [
        windows_of(bytes_.RandomWindows(corpus, (1, 20), seq_len=1, seed=seed)[step]).tobytes()
        for seed in range(5)
        for step in range(5)
    ]
    assert len(set(batches)) == 25


def test_random_windows_reach_both_ends(corpus: Corpus):
    windows = bytes_.RandomWindows(corpus, (1, 200), seq_len=90, seed=0)
    starts = windows_of(windows[0])[0, :, 0]
    assert set(starts.tolist()) == set(range(10))


def test_consecutive_windows(corpus: Corpus):
    windows = bytes_.ConsecutiveWindows(corpus, (2, 2), seq_len=8)  # rows of 25 bytes: 3 windows
    assert windows.per_row == 3
    batches = [windows[step] for step in range(4)]
    assert [batch.restart for batch in batches] == [True, False, False, True]
    np.testing.assert_array_equal(windows_of(batches[0])[..., 0].ravel(), [0, 25, 50, 75])
    for before, after in itertools.pairwise(batches[:3]):
        np.testing.assert_array_equal(windows_of(before)[..., -1], windows_of(after)[..., 0])
    np.testing.assert_array_equal(windows_of(batches[3]), windows_of(batches[0]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (1, 11), (5, 2)])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8])
def test_rows_read_their_own_stretches_and_no_more(
    corpus: Corpus, shape: tuple[int, int], seq_len: int
):
    """Windows fill each row's stretch, a window and its next byte never reach the next row's."""
    windows = bytes_.ConsecutiveWindows(corpus, shape, seq_len)
    rows = shape[0] * shape[1]
    stretch = len(corpus) // rows
    last = windows[windows.per_row - 1]
    assert not last.restart or windows.per_row == 1
    ends = windows_of(last)[..., -1].ravel()
    limits = stretch * np.arange(1, rows + 1)
    assert (ends < limits).all()
    assert (ends + seq_len >= limits).all()  # no room for one more
    assert windows[windows.per_row].restart


def test_consecutive_windows_need_room(corpus: Corpus):
    with pytest.raises(UsageError, match=r"100 training bytes over 20 rows.*window of 9"):
        bytes_.training_windows(corpus, (2, 10), 8, stateful=True, seed=0)


def test_validation_batches(corpus: Corpus):
    batches = bytes_.validation_batches(corpus, rows=2, seq_len=8, n_bytes=48)
    assert [batch.inputs.shape for batch in batches] == [(1, 2, 8)] * 3
    again = bytes_.validation_batches(corpus, rows=2, seq_len=8, n_bytes=48)
    np.testing.assert_array_equal(windows_of(batches[2]), windows_of(again[2]))
    everything = bytes_.validation_batches(corpus, rows=64, seq_len=8, n_bytes=10**9)
    assert everything[0].inputs.shape == (1, 11, 8)
    assert len(everything) == 1


def task(corpus: Corpus, *, seq_len: int, stateful: bool = False) -> Bytes:
    """Two rows; the last fifth of the bytes is for validation."""
    batch = BatchConfig(seq_len=seq_len, batch_size=2, stateful=stateful, seed=1)
    return Bytes(BytesConfig(val_fraction=0.2), batch, corpus)


@pytest.mark.parametrize("stateful", [False, True])
def test_prefetch_begins_at_any_step(corpus: Corpus, stateful: bool):
    stream = task(corpus, seq_len=8, stateful=stateful)
    for start in (0, 5):
        batches = prefetch(stream, start, slice(0, 2))
        for step in range(start, start + 4):
            np.testing.assert_array_equal(windows_of(next(batches)), windows_of(stream[step]))


@pytest.mark.parametrize("stateful", [False, True])
def test_a_process_reads_its_rows_alone(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, stateful: bool
):
    stream, read = task(corpus, seq_len=8, stateful=stateful), list[int]()
    whole = windows_of(stream[3])
    of_corpus = Corpus.read
    monkeypatch.setattr(
        Corpus, "read", lambda self, start, n: read.append(start) or of_corpus(self, start, n)
    )
    np.testing.assert_array_equal(windows_of(rows_of(stream, 3, slice(1, 2))), whole[:, 1:])
    assert len(read) == 1
    batch = next(prefetch(stream, 3, slice(1, 2)))
    assert batch.restart == stream[3].restart
    np.testing.assert_array_equal(windows_of(batch), whole[:, 1:])


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        (False, r"c\.bin was cut short, from 60 bytes to 10"),
        (True, r"c\.bin cannot be read: No such file or directory"),
    ],
)
def test_the_prefetch_thread_passes_on_that_a_file_cannot_be_read(
    corpus: Corpus, tmp_path: Path, removed: bool, sentence: str
):
    batches = prefetch(task(corpus, seq_len=19), 0, slice(0, 2))
    for _ in range(3):
        next(batches)
    if removed:
        (tmp_path / "c.bin").unlink()
        corpus_._open.cache_clear()  # after it: the prefetch thread may have the file open
    else:
        os.truncate(tmp_path / "c.bin", 10)
    with pytest.raises(DataError, match=sentence):
        list(itertools.islice(batches, 20))


@pytest.fixture
def run() -> Any:
    """A run, of which the task uses little, that keeps what it is told."""

    class Run:
        directory = Path("run")

        def __init__(self) -> None:
            self.said: list[str] = []
            self.written: dict[str, bytes] = {}

        def say(self, message: str) -> None:
            self.said.append(message)

        def write(self, name: str, content: bytes) -> None:
            self.written[name] = content

    return Run()


def test_a_sample_at_the_end(corpus: Corpus, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(_: Any, prompt: np.ndarray, n: int, **__: Any) -> np.ndarray:
        assert (prompt.tobytes(), n) == (b"def ", 400)
        return np.array([[ord("x"), 0xFF]])

    monkeypatch.setattr(e88_jax.sampling, "generate", generate)
    model: Any = None
    task(corpus, seq_len=8).finish(model, run)
    assert run.written == {"sample.txt": b"def x\xff"}
    assert "def x\ufffd" in run.said[0]


def test_weights_that_are_not_finite_give_a_warning_and_no_sample(
    corpus: Corpus, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise ValueError("the logits of row 0 are not finite.")

    monkeypatch.setattr(e88_jax.sampling, "generate", generate)
    model: Any = None
    task(corpus, seq_len=8).finish(model, run)
    assert capsys.readouterr().err == "warning: no sample: the logits of row 0 are not finite.\n"
    assert (run.said, run.written) == ([], {})


def test_no_sample_where_none_is_asked_for(corpus: Corpus, run: Any) -> None:
    model: Any = None
    Bytes(BytesConfig(sample_bytes=0), BatchConfig(seq_len=4), corpus).finish(model, run)
    assert (run.said, run.written) == ([], {})


def test_validation_bytes_are_never_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Names of the same file are one file; of copies a warning tells."""
    everything = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(everything)
    (tmp_path / "latest").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "b")
    training, validation = split(Corpus.of([str(tmp_path)]), 0.3, 16)
    assert validation.read(0, len(validation)).tobytes() == everything[700:]
    assert training.read(0, len(training)).tobytes() == everything[:700]
    config = BytesConfig(data=(str(tmp_path),), val_fraction=0.3)
    config.open(BatchConfig(seq_len=16), None)
    assert capsys.readouterr().err == ""
    (tmp_path / "copy").write_bytes(everything)
    config.open(BatchConfig(seq_len=16), None)
    assert capsys.readouterr().err == ""  # it is trained on in part
    dataclasses.replace(config, val_fraction=0.5).open(BatchConfig(seq_len=16), None)
    assert capsys.readouterr().err == (
        f"warning: 100% of the validation bytes are trained on: {tmp_path}/copy is among the "
        "training files under another name.\n"
    )
