"""Streams and exit codes of the programs, on descriptors that fail as real ones do."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from e88_jax import command


def gone_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def not_for_writing() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def gone_terminal() -> int:
    master, slave = os.openpty()
    os.close(master)
    return slave


@pytest.fixture(params=[gone_reader, full_disk, not_for_writing, gone_terminal])
def broken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes no write."""
    fd = request.param()
    yield fd
    os.close(fd)


def test_what_cannot_be_written_is_dropped(broken: int) -> None:
    stream = command._open_stream(broken, "utf-8", required=False)
    for _ in range(3):
        print("words", file=stream)
        stream.write("half a line")
        stream.flush()
    stream.close()


def test_the_first_failure_of_required_output_names_it(broken: int) -> None:
    stream = command._open_stream(broken, "utf-8", required=True)
    with pytest.raises(OSError, match="standard output"):
        print("words", file=stream)
    print("more", file=stream)  # as the interpreter flushes at exit
    stream.close()


@pytest.mark.parametrize(
    ("encoding", "printed"), [("utf-8", "ü€ \\udcff"), ("cp1252", "ü€ \\udcff"), ("ascii", None)]
)
def test_every_character_can_be_printed(tmp_path: Path, encoding: str, printed: str | None) -> None:
    with (tmp_path / "out").open("wb") as file:
        stream = command._open_stream(file.fileno(), encoding, required=True)
        print(os.fsdecode("ü€ ".encode() + b"\xff"), file=stream)
    expected = "\\xfc\\u20ac \\udcff" if printed is None else printed
    assert (tmp_path / "out").read_text(encoding) == expected + "\n"


def test_a_reader_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PATIENCE_SECONDS", 0.01)
    read, write = os.pipe()
    stream = command._open_stream(write, "utf-8", required=False)
    print("x" * 1_000_000, file=stream)
    print("lost", file=stream)
    os.set_blocking(read, False)
    assert set(os.read(read, 1 << 20)) <= set(b"x")
    print("heard", file=stream)
    assert os.read(read, 1 << 20) == b"heard\n"
    for fd in (read, write):
        os.close(fd)


def exit_of(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[Sequence[str]], int | None]
) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/program.py", "--flag"])
    with pytest.raises(SystemExit) as stopped:
        command.run(main)
    return stopped.value.code


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[..., None]:
    def main(words: Sequence[str]) -> None:
        assert words == ["--flag"]
        raise error from cause

    return main


class Stopped(command.ProgramEnd):
    exit_code = 7


def of_the_device(message: str) -> Exception:
    import jax

    return jax.errors.JaxRuntimeError(message)


FULL = OSError(28, "No space left on device")
NO_FILE = FileNotFoundError(2, "No such file or directory", "a/b")


@pytest.mark.parametrize(
    ("main", "code", "sentence"),
    [
        (raising(Stopped("that is all.")), 7, "that is all."),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
        (raising(NO_FILE), 2, "a/b: No such file or directory."),
        (raising(OSError(13, "Denied", b"a", None, "b")), 2, "a to b: Denied."),
        (raising(FULL), 2, "No space left on device."),
        (raising(OSError("pipes are clogged")), 2, "pipes are clogged."),
        (raising(ValueError("wrapped"), FULL), 2, "No space left on device."),
        (raising(ExceptionGroup("", [ExceptionGroup("", [NO_FILE]), FULL])), 2, "a/b: No such"),
        (raising(MemoryError()), 2, "the host is out of memory: a smaller batch"),
        (raising(MemoryError("9 GiB")), 2, "the host is out of memory (9 GiB): a smaller batch"),
        (
            raising(of_the_device("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")),
            2,
            "the device is out of memory (Out of memory allocating 8 bytes): a smaller batch",
        ),
    ],
)
def test_one_sentence_and_an_exit_code(
    main: Callable[[Sequence[str]], None],
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_of(monkeypatch, main) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"program.py: {sentence}")
    assert printed.err.count("\n") == 1


def test_an_error_without_a_file_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(words: Sequence[str]) -> None:
        del words
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    monkeypatch.setattr(sys, "argv", [str(Path(__file__).with_name("program.py"))])
    with pytest.raises(SystemExit) as stopped:
        command.run(main)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err
    assert "No space left on device, in test_command.py, line " in sentence
    assert sentence.endswith('file.write("x" * 100_000)\n')


@pytest.mark.parametrize(
    "error",
    [
        KeyError("bug"),
        io.UnsupportedOperation("not readable"),
        ExceptionGroup("", [FULL, KeyError("bug")]),
        of_the_device("INTERNAL: a fault of the compiler"),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program.py", "--flag"])
    with pytest.raises(type(error)) as raised:
        command.run(raising(error))
    assert raised.value is error


def test_a_fault_while_an_error_is_handled_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(words: Sequence[str]) -> None:
        try:
            raise NO_FILE
        except OSError:
            words[10]

    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(IndexError):
        command.run(main)


PROGRAM = """
import sys
from e88_jax import command

def main(args):
    print("ü", args[0])
    print("to stderr", file=sys.stderr)
    sys.stdout.write("no newline")
    with open(__file__) as file:
        return 0 if file.fileno() > 2 else 50

command.run(main, output_is_result=sys.argv[1] == "result")
"""


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("", 0, ""),
        ("<&- 2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">&-", 2, "program.py: standard output: Bad file descriptor.\n"),
        (">/dev/full", 2, "program.py: standard output: No space left on device.\n"),
        ("<&- >&- 2>&-", 2, ""),
        (">/dev/full 2>&1", 2, ""),
        ("| :", 141, ""),
    ],
)
def test_redirections(redirection: str, code: int, said: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def shell(word: str) -> tuple[int, str]:
        begin = "sleep 0.2; exec " if redirection == "| :" else ""  # the reader has gone by then
        line = f"({begin}{sys.executable} {program} {word}) {redirection}; exit ${{PIPESTATUS[0]}}"
        environment = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[1])}
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env=environment, check=False
        )
        return done.returncode, done.stderr.replace("to stderr\n", "")

    assert shell("result") == (code, said)
    assert shell("files") == (0, "")
