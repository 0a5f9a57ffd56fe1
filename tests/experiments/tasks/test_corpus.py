"""Corpora and their splits."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.cli.errors import UsageError
from experiments.tasks import corpus as data
from experiments.tasks.base import DataError


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


@pytest.fixture
def corpus(three_files: Path) -> data.Corpus:
    return data.Corpus.of([str(three_files)])


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
        with pytest.raises(DataError, match=rf"c\.bin {sentence}"):
            corpus.read(start, length)


def test_a_file_that_is_cut_short_between_look_and_read(
    three_files: Path, corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
):
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, length, start: pread(fd, min(length, 30 - start), start)
    )
    with pytest.raises(DataError, match=r"c\.bin was cut short, from 60 bytes to 30"):
        corpus.read(10, 60)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch, number: int):
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=rf"a\.bin cannot be read: {os.strerror(number)}"):
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
    with pytest.raises(DataError, match="was cut short, from 60 bytes to 50"):
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
