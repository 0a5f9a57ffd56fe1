"""Files that --data names: each once, by what it is."""

import collections
import os
import sysconfig
from pathlib import Path

import pytest

from experiments.cli.errors import UsageError
from experiments.tasks import files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str | bytes, content: bytes = b"text") -> None:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    Path(os.fsdecode(name)).write_bytes(content)


def found(*patterns: str) -> list[str]:
    return [str(path) for path in files.find_files(patterns)]


def left_out(*patterns: str) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    files.find_files(patterns, counts)
    return dict(counts)


def test_a_file_is_taken_once_whatever_names_lead_to_it(here: Path) -> None:
    put("a/text")
    os.link("a/text", "a/hard")
    os.symlink("text", "a/link")
    os.symlink("a", "b")
    names = ["a/text", "./a/text", "b/text", str(here / "a" / "text"), "a/../a/text", "a", "a/*"]
    assert found(*names) == ["a/text"]
    assert left_out(*names)["second names of files"] == 5
    assert found("a") == ["a/hard"]
    put("a/other")
    assert found("b", "a") == ["b/hard", "b/other"]


def test_a_name_given_again_is_no_second_name(here: Path) -> None:
    put("a/text")
    names = "a/text", "a/text", "a", "a/*", "**/text"
    assert left_out(*names) == {"second names of files": 0}


@pytest.mark.parametrize("pattern", ["data", "data/", "data/**", "data/**/*", "d*", "**/data"])
def test_links_are_followed_alike(here: Path, pattern: str) -> None:
    put("books/a.txt")
    put("data/b.txt")
    os.symlink("../books", "data/books")
    assert found(pattern) == ["data/b.txt", "data/books/a.txt"]


@pytest.mark.parametrize("pattern", ["data", "data/**", "data/**/*.txt", "**"])
def test_loops_of_links_end(here: Path, pattern: str) -> None:
    put("data/deep/b.txt")
    for name in ("one", "two", "deep/three"):
        os.symlink(here / "data", here / "data" / name)
    os.symlink("itself", "data/itself")
    assert [os.path.basename(name) for name in found(pattern)] == ["b.txt"]


def test_globs_of_any_depth(here: Path) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/d.bin", "x/.hidden/e.txt"):
        put(name)
    assert found("**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
    assert found(str(here / "x/**/*.txt")) == [str(here / x) for x in ("x/b.txt", "x/y/c.txt")]
    assert found("x/**/y/*") == ["x/y/c.txt", "x/y/d.bin"]
    assert found("**/y/**") == ["x/y/c.txt", "x/y/d.bin"]
    assert found("x/*.txt") == ["x/b.txt"]


ODD = [
    b"~notes.txt",
    b"~",
    b"a[1].txt",
    b"*",
    b"**",
    b"two\nlines",
    b"\xff\xfe",
    b"-x",
    b" ",
    b"a?b",
]


@pytest.mark.parametrize("name", ODD)
def test_names_are_names(here: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    put(b"home/other")
    put(name)
    path = os.fsdecode(name)
    assert found(path) == [path]
    os.mkdir("folder")
    os.rename(name, b"folder/" + name)
    assert found("folder") == [f"folder/{path}"]
    assert found(f"folder/{path}") == [f"folder/{path}"]


def test_the_home_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "ho[me]"))
    put("ho[me]/a.txt")
    assert found("~/a.txt") == [str(here / "ho[me]" / "a.txt")]


def test_folders_of_odd_names_hold_globs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("x[1]/y/a.txt")
    put("x1/y/b.txt")
    assert found("x[1]") == ["x[1]/y/a.txt"]
    monkeypatch.chdir(here / "x[1]")
    for pattern in ("y/*.txt", "**/*.txt", "y", "y/a.txt"):
        anywhere = files.absolute(pattern)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            assert found(anywhere) == [str(here / "x[1]" / "y" / "a.txt")]


def test_what_is_left_out_is_counted(here: Path) -> None:
    put("data/a")
    put("data/.hidden")
    put("data/.git/config")
    os.link("data/a", "data/b")
    os.symlink("nowhere", "data/c")
    os.mkfifo("data/d")
    put("data/run/run.json", b'{"config": {}, "devices": "", "versions": {}}')
    put("data/run/metrics.jsonl")
    put("data/killed/run.json", b'{"conf')
    put("data/killed/checkpoints/1/x")
    put("data/claimed/lock", b'{"boot": "", "pid": 1}')
    put("data/no_run/run.json", b'{"config": 1}')
    counts = {"second names of files": 1, "links to nothing": 1, "special files": 1}
    counts |= {"directories of runs": 3}
    assert found("data") == found("data/*") == ["data/a", "data/no_run/run.json"]
    assert left_out("data") == {**counts, "hidden names": 2}
    assert left_out("data/*") == counts
    assert found("data/.hidden", "data/run/metrics.jsonl") == [
        "data/.hidden",
        "data/run/metrics.jsonl",
    ]


def test_folders_with_nothing_but_runs(here: Path) -> None:
    put("runs/x/run.json", b'{"config": {}, "devices": "", "versions": {}}')
    put("texts/a")
    assert found("runs", "texts") == ["texts/a"]
    for pattern in ("runs", "runs/x", "runs/**/*"):
        with pytest.raises(UsageError, match=r"nothing but what runs wrote"):
            found(pattern)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("", '"" names nothing: is a shell variable unset'),
        ("none", "none is no file, directory or matching glob"),
        ("no*ne", r"no\*ne is no file"),
        ("**/none", "none is no file"),
        ("empty", "empty holds no file"),
        ("dangling", "dangling cannot be read: No such file"),
        ("loop", "loop cannot be read: Too many levels of symbolic links"),
        ("pipe", "pipe is not a regular file"),
        ("a/under", "a/under is no file"),
        ("x" * 300, "cannot be read: File name too long"),
    ],
)
def test_mistakes(here: Path, pattern: str, sentence: str) -> None:
    put("a")
    os.mkdir("empty")
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    with pytest.raises(UsageError, match=sentence):
        found("a", pattern)


@pytest.mark.parametrize(
    ("call", "name"), [("scandir", "deep"), ("stat", "deep"), ("stat", "a"), ("lstat", "data")]
)
def test_what_may_not_be_looked_at_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    put("data/deep/a")
    real = getattr(os, call)

    def refuse(path: str, *args: object, **options: object) -> object:
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UsageError, match=r"--data data.* cannot be read: Permission denied"):
        found("data")


def test_the_standard_library(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["abc.py", "email/a.py", "email.py", "lib.so", "x.pyc"]
    skipped = ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
    names += [f"{folder}/x.py" for folder in skipped] + [f"lib/{folder}/x.py" for folder in skipped]
    for name in names:
        put(f"python/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(here / "python"))
    expected = ["abc.py", "email/a.py", "email.py"]
    assert found() == [str(here / "python" / name) for name in expected]
