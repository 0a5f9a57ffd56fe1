"""Corpora, splits and windows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from harness import data
from harness.errors import UsageError


@pytest.fixture
def three_files(tmp_path: Path) -> Path:
    """Bytes 0 to 99 in files of 10, 0, 60 and 30 bytes, and a hidden file."""
    everything = np.arange(100, dtype=np.uint8).tobytes()
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(everything[:10])
    (tmp_path / "b.bin").write_bytes(b"")
    (tmp_path / "c.bin").write_bytes(everything[10:70])
    (tmp_path / "deep" / "d.bin").write_bytes(everything[70:])
    (tmp_path / ".hidden").write_bytes(b"no")
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "**/*.bin"])
def test_reads_across_files(three_files: Path, pattern: str):
    corpus = data.Corpus.of([str(three_files / pattern)])
    assert len(corpus) == 100
    for start, length in [(0, 100), (9, 2), (10, 60), (69, 1), (69, 2), (99, 1), (5, 90)]:
        np.testing.assert_array_equal(corpus.read(start, length), np.arange(start, start + length))
    part = corpus.part(20, 90).part(3, 60)
    assert len(part) == 57
    np.testing.assert_array_equal(part.read(50, 7), np.arange(73, 80))


def test_one_file_and_repeated_patterns(three_files: Path):
    corpus = data.Corpus.of([str(three_files / "a.bin"), str(three_files / "*.bin")])
    assert [file.name for file in corpus.files] == ["a.bin", "c.bin"]


def test_files_are_mapped_not_loaded(three_files: Path):
    corpus = data.Corpus.of([str(three_files / "c.bin")])
    data._map_file.cache_clear()
    corpus.read(0, 1)
    assert isinstance(data._map_file(corpus.files[0]), np.memmap)


def test_fingerprint_follows_names_and_sizes(three_files: Path):
    corpus = data.Corpus.of([str(three_files)])
    assert corpus.fingerprint() == data.Corpus.of([str(three_files)]).fingerprint()
    (three_files / "b.bin").write_bytes(b"x")
    assert corpus.fingerprint() != data.Corpus.of([str(three_files)]).fingerprint()


def test_standard_library_is_the_default():
    corpus = data.Corpus.of([])
    assert len(corpus) > 1_000_000
    assert not any("test" in file.parts or "site-packages" in file.parts for file in corpus.files)
    assert "argparse.py" in {file.name for file in corpus.files}


def test_missing_and_empty_data(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nothing\* is no file"):
        data.Corpus.of([str(tmp_path / "nothing*")])
    with pytest.raises(UsageError, match="holds no file"):
        data.Corpus.of([str(tmp_path)])
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="holds no bytes"):
        data.Corpus.of([str(tmp_path)])


def test_split_by_position(three_files: Path):
    training, validation = data.split(data.Corpus.of([str(three_files)]), 0.2, seq_len=10)
    np.testing.assert_array_equal(training.read(0, len(training)), np.arange(80))
    np.testing.assert_array_equal(validation.read(0, len(validation)), np.arange(80, 100))
    with pytest.raises(UsageError, match=r"100 bytes leaves 20 for validation.*window of 31"):
        data.split(data.Corpus.of([str(three_files)]), 0.2, seq_len=30)


@pytest.fixture
def corpus(three_files: Path) -> data.Corpus:
    return data.Corpus.of([str(three_files)])


def test_random_windows(corpus: data.Corpus):
    windows = data.RandomWindows(corpus, (2, 3), seq_len=7, seed=5)
    batch = windows[11]
    assert batch.restart
    assert batch.windows.shape == (2, 3, 8)
    assert batch.windows.dtype == np.uint8
    steps = np.diff(batch.windows.astype(int), axis=-1)
    np.testing.assert_array_equal(steps, np.ones_like(steps))  # consecutive bytes of the corpus
    np.testing.assert_array_equal(batch.windows, windows[11].windows)
    assert not np.array_equal(batch.windows, windows[12].windows)
    other_seed = data.RandomWindows(corpus, (2, 3), seq_len=7, seed=6)
    assert not np.array_equal(batch.windows, other_seed[11].windows)


def test_random_windows_reach_both_ends(corpus: data.Corpus):
    windows = data.RandomWindows(corpus, (1, 200), seq_len=90, seed=0)
    starts = windows[0].windows[0, :, 0]
    assert set(starts.tolist()) == set(range(10))


def test_consecutive_windows(corpus: data.Corpus):
    windows = data.ConsecutiveWindows(corpus, (2, 2), seq_len=8)  # rows of 25 bytes: 3 windows
    assert windows.per_row == 3
    batches = [windows[step] for step in range(4)]
    assert [batch.restart for batch in batches] == [True, False, False, True]
    np.testing.assert_array_equal(batches[0].windows[..., 0].ravel(), [0, 25, 50, 75])
    for before, after in itertools.pairwise(batches[:3]):
        np.testing.assert_array_equal(before.windows[..., -1], after.windows[..., 0])
    np.testing.assert_array_equal(batches[3].windows, batches[0].windows)


def test_consecutive_windows_need_room(corpus: data.Corpus):
    with pytest.raises(UsageError, match=r"100 training bytes over 20 rows.*window of 9"):
        data.training_windows(corpus, (2, 10), 8, stateful=True, seed=0)


def test_validation_batches(corpus: data.Corpus):
    batches = data.validation_batches(corpus, rows=2, seq_len=8, n_bytes=48)
    assert [batch.windows.shape for batch in batches] == [(1, 2, 9)] * 3
    again = data.validation_batches(corpus, rows=2, seq_len=8, n_bytes=48)
    np.testing.assert_array_equal(batches[2].windows, again[2].windows)
    everything = data.validation_batches(corpus, rows=64, seq_len=8, n_bytes=10**9)
    assert everything[0].windows.shape == (1, 11, 9)
    assert len(everything) == 1


@pytest.mark.parametrize("stateful", [False, True])
def test_prefetch_continues_where_it_was(corpus: data.Corpus, stateful: bool):
    windows = data.training_windows(corpus, (1, 2), 8, stateful=stateful, seed=1)
    batches = data.prefetch(windows)
    for step in range(5):
        np.testing.assert_array_equal(next(batches).windows, windows[step].windows)
    position = batches.get_state()
    resumed = data.prefetch(windows)
    resumed.set_state(position)
    for step in range(5, 9):
        np.testing.assert_array_equal(next(resumed).windows, windows[step].windows)
