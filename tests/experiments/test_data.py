"""Corpora, splits and windows."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import data
from experiments.harness.config import DataConfig, TrainConfig
from experiments.harness.errors import UsageError


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


def digests(*paths: Path) -> list[str]:
    return [data.DataFile.at(path).digest for path in paths]


def fingerprint(*paths: Path) -> str:
    return data.Corpus.of([str(path) for path in paths]).fingerprint()


def test_the_fingerprint_is_that_of_the_contents_in_order(three_files: Path, tmp_path: Path):
    a, c = three_files / "a.bin", three_files / "c.bin"
    before = fingerprint(a, c)
    assert fingerprint(a, c) == before
    assert fingerprint(c, a) != before
    assert fingerprint(a) != before
    (three_files / "moved").mkdir()
    assert fingerprint(a.rename(three_files / "moved" / "z.bin"), c) == before
    moved = three_files / "moved" / "z.bin"
    bytes_before = moved.read_bytes()
    moved.write_bytes(bytes_before[::-1])  # as many
    assert fingerprint(moved, c) != before
    # The same bytes in a row, divided otherwise.
    moved.write_bytes(bytes_before + c.read_bytes()[:1])
    c.write_bytes(c.read_bytes()[1:])
    assert fingerprint(moved, c) != before


def test_the_digest_of_a_file(tmp_path: Path):
    """Each byte of a file of 1 MiB counts; of a larger one samples, both its ends among them."""
    whole = data.DIGEST_BLOCK * data.DIGEST_BLOCKS
    for size, changes in (
        (5, (0, 4)),
        (whole, (0, 12_345, 777_777, whole - 1)),
        (2**23 + 5, (0, -1)),
    ):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        seen = digests(path)
        for change in changes:
            content = bytearray(size)
            content[change] = 1
            path.write_bytes(content)
            seen += digests(path)
        path.write_bytes(bytes(size + 1))
        seen += digests(path)
        assert len(set(seen)) == len(changes) + 2
        path.write_bytes(bytes(size))
        assert digests(path) == seen[:1]


def test_a_large_file_is_sampled_all_over(tmp_path: Path):
    """No stretch of two blocks' distance goes unread."""
    path, size = tmp_path / "large", 2**23
    path.write_bytes(bytes(size))
    before = digests(path)
    distance = size // (data.DIGEST_BLOCKS - 1)
    for start in range(0, size - distance, distance * 7):
        content = bytearray(size)
        content[start : start + distance] = b"x" * distance
        path.write_bytes(content)
        assert digests(path) != before


def test_files_are_not_loaded_and_few_are_open(tmp_path: Path):
    for name in range(100):
        (tmp_path / f"{name:03}").write_bytes(bytes([name]))
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 10**12)
    corpus = data.Corpus.of([str(tmp_path)])
    np.testing.assert_array_equal(corpus.read(0, 101), [*range(100), 0])
    assert corpus.read(10**12, 100).tolist() == [0] * 100
    if os.path.isdir("/proc/self/fd"):
        opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert 0 < sum(name.startswith(str(tmp_path)) for name in opened) <= 64


def test_a_read_that_gives_less_than_asked_for_is_gone_on_with(
    corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, start: pread(fd, min(length, 3), start))
    np.testing.assert_array_equal(corpus.read(5, 90), np.arange(5, 95))


def cut_short(path: Path) -> None:
    os.truncate(path, 20)


def overwritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (1, 1))  # clocks of file systems may be coarse


def removed(path: Path) -> None:
    path.unlink()
    data._open.cache_clear()  # after it: the prefetch thread may have the file open


def replaced(path: Path) -> None:
    data._open.cache_clear()
    path.with_suffix(".new").write_bytes(b"x" * 60)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("happens", "sentence"),
    [
        (cut_short, "was cut short, from 60 bytes to 20"),
        (overwritten, "has changed: its 60 bytes are others now"),
        (removed, "cannot be read: No such file or directory"),
        (replaced, "has changed: its 60 bytes are others now"),
    ],
)
def test_a_file_that_changes_while_it_is_read(
    three_files: Path, corpus: data.Corpus, happens: Callable[[Path], None], sentence: str
):
    corpus.read(0, 100)
    happens(three_files / "c.bin")
    np.testing.assert_array_equal(corpus.read(2, 5), np.arange(2, 7))
    for start, length in ((10, 1), (50, 10), (5, 90)):
        with pytest.raises(data.CorpusError, match=rf"c\.bin {sentence}"):
            corpus.read(start, length)


def test_a_file_that_is_cut_short_between_look_and_read(
    three_files: Path, corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
):
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, length, start: pread(fd, min(length, 30 - start), start)
    )
    with pytest.raises(data.CorpusError, match=r"c\.bin was cut short, from 60 bytes to 30"):
        corpus.read(10, 60)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch, number: int):
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(data.CorpusError, match=rf"a\.bin cannot be read: {os.strerror(number)}"):
        corpus.read(0, 5)


def test_what_does_not_change_the_bytes_is_no_change(three_files: Path, corpus: data.Corpus):
    path = three_files / "c.bin"
    os.utime(path, (1, 1))
    np.testing.assert_array_equal(corpus.read(0, 100), np.arange(100))
    with path.open("ab") as file:
        file.write(b"more")
    np.testing.assert_array_equal(corpus.read(0, 100), np.arange(100))
    data._open.cache_clear()
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    np.testing.assert_array_equal(corpus.read(0, 100), np.arange(100))


@pytest.mark.parametrize("happens", [cut_short, removed])
def test_the_prefetch_thread_passes_it_on(
    three_files: Path, corpus: data.Corpus, happens: Callable[[Path], None]
):
    windows = data.training_windows(corpus, (1, 2), 90, stateful=False, seed=1)
    batches = data.prefetch(windows)
    for _ in range(3):
        next(batches)
    happens(three_files / "c.bin")
    with pytest.raises(data.CorpusError, match=r"c\.bin"):
        list(itertools.islice(batches, 20))
    step = batches.get_state()
    assert 3 <= step["next_index"] < 20  # that of the batch that could not be read


def test_the_listing_gives_the_corpus_back(three_files: Path, monkeypatch: pytest.MonkeyPatch):
    odd = three_files / os.fsdecode(b"odd\xff\n[")
    odd.write_bytes(b"odd")
    monkeypatch.chdir(three_files)
    corpus = data.Corpus.of([str(three_files / "a.bin"), "c.bin", odd.name])
    corpus.write_listing(three_files / "corpus.jsonl")
    monkeypatch.chdir("/")
    again = data.Corpus.listed(three_files / "corpus.jsonl")
    assert again.files == (three_files / "a.bin", three_files / "c.bin", odd)
    assert again.fingerprint() == corpus.fingerprint()
    assert (len(again), again.read(70, 3).tobytes()) == (73, b"odd")
    os.truncate(three_files / "c.bin", 50)
    with pytest.raises(data.CorpusError, match="was cut short, from 60 bytes to 50"):
        again.sources[1].check()


@pytest.mark.parametrize(
    "content",
    [None, b"{", b"3\n", b'{"path": "x"}\n', b"\xff", b'{"path": 1, "bytes": 1, "digest": ""}'],
)
def test_a_listing_that_is_damaged(tmp_path: Path, content: bytes | None):
    listing = tmp_path / "corpus.jsonl"
    if content is not None:
        listing.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{listing}.* (is gone|is damaged)"):
        data.Corpus.listed(listing)


def test_standard_library_is_the_default():
    corpus = data.Corpus.of([])
    assert len(corpus) > 1_000_000
    assert not any("test" in file.parts or "site-packages" in file.parts for file in corpus.files)
    assert "argparse.py" in {file.name for file in corpus.files}


def test_what_is_left_out_is_said(three_files: Path):
    assert data.Corpus.of([str(three_files)]).left_out == "hidden names 1, empty files 1"
    assert data.Corpus.of([str(three_files / "a.bin")]).left_out == ""


def test_validation_bytes_are_never_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Names of the same file are one file; of copies a warning tells."""
    everything = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(everything)
    (tmp_path / "latest").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "b")
    training, validation = data.split(data.Corpus.of([str(tmp_path)]), 0.3, 16)
    assert validation.read(0, len(validation)).tobytes() == everything[700:]
    assert training.read(0, len(training)).tobytes() == everything[:700]
    config = TrainConfig(data=DataConfig(data=(str(tmp_path),), val_fraction=0.3, seq_len=16))
    data.open_corpus(config)
    assert capsys.readouterr().err == ""
    (tmp_path / "copy").write_bytes(everything)
    data.open_corpus(config)
    assert capsys.readouterr().err == ""  # it is trained on in part
    config = TrainConfig(data=DataConfig(data=(str(tmp_path),), val_fraction=0.5, seq_len=16))
    data.open_corpus(config)
    assert capsys.readouterr().err == (
        f"warning: 100% of the validation bytes are trained on: {tmp_path}/copy is among the "
        "training files under another name.\n"
    )


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
    for seq_len in (20, 30):
        with pytest.raises(UsageError, match=rf"leaves 20 for validation.*window of {seq_len + 1}"):
            data.split(data.Corpus.of([str(three_files)]), 0.2, seq_len)
    data.split(data.Corpus.of([str(three_files)]), 0.2, seq_len=19)


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


def test_seeds_and_steps_share_no_batch(corpus: data.Corpus):
    batches = [
        data.RandomWindows(corpus, (1, 20), seq_len=1, seed=seed)[step].windows.tobytes()
        for seed in range(5)
        for step in range(5)
    ]
    assert len(set(batches)) == 25


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


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (1, 11), (5, 2)])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8])
def test_rows_read_their_own_stretches_and_no_more(
    corpus: data.Corpus, shape: tuple[int, int], seq_len: int
):
    """Windows fill each row's stretch, a window and its next byte never reach the next row's."""
    windows = data.ConsecutiveWindows(corpus, shape, seq_len)
    rows = shape[0] * shape[1]
    stretch = len(corpus) // rows
    last = windows[windows.per_row - 1]
    assert not last.restart or windows.per_row == 1
    ends = last.windows[..., -1].ravel()
    limits = stretch * np.arange(1, rows + 1)
    assert (ends < limits).all()
    assert (ends + seq_len >= limits).all()  # no room for one more
    assert windows[windows.per_row].restart


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
