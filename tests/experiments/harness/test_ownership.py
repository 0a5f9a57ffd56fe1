"""Who may write into a run's directory."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from experiments.cli.errors import UsageError
from experiments.harness import ownership
from experiments.harness.ownership import LOCK, Owner, owned


def leave(directory: Path, owner: Owner) -> None:
    """The lock file of a process that was killed."""
    (directory / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))


def elsewhere(**changes: object) -> Owner:
    return dataclasses.replace(Owner.here(), pid=2**22 + 1, **changes)


def test_a_second_process_is_told_of_the_first(tmp_path: Path):
    here = Owner.here()
    with owned(tmp_path):
        first = (tmp_path / LOCK).read_bytes()
        sentence = rf"in use by process {here.pid} on host {here.host} since \d{{4}}-"
        with pytest.raises(UsageError, match=sentence), owned(tmp_path):
            pass
        assert (tmp_path / LOCK).read_bytes() == first
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("left", ["", "{", "[]", "null", '{"pid": 3}', '"x"'])
def test_a_lock_file_that_names_nobody_holds_nothing(tmp_path: Path, left: str):
    (tmp_path / LOCK).write_text(left)
    with owned(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_killed_owner_holds_nothing(tmp_path: Path):
    for gone in (elsewhere(), elsewhere(boot="before"), elsewhere(host="container")):
        leave(tmp_path, gone)
        with owned(tmp_path):
            pass


def test_an_owner_on_another_host_holds_until_its_file_is_deleted(tmp_path: Path):
    leave(tmp_path, elsewhere(host="other", boot="other"))
    sentence = rf"on host other since .* nobody can see .* delete {tmp_path / LOCK}"
    with pytest.raises(UsageError, match=sentence), owned(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with owned(tmp_path):
        pass


def test_without_locks_a_process_is_known_by_its_number_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ownership, "_lock", lambda _: False)
    here = Owner.here()
    if here.started is None:
        pytest.skip("needs /proc")
    leave(tmp_path, here)
    with pytest.raises(UsageError, match=f"process {here.pid} .* If it runs no more, delete"):
        ownership._take(tmp_path / LOCK)
    for gone in (elsewhere(), dataclasses.replace(here, started=here.started - 1)):
        leave(tmp_path, gone)
        with owned(tmp_path):
            pass


def test_a_lock_file_that_its_owner_takes_along_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another process leaves between this one's opening of the file and locking it."""
    lock, calls = ownership._lock, []

    def lock_after_it_left(file: object) -> bool:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(file)
        return lock(file)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ownership, "_lock", lock_after_it_left)
    with owned(tmp_path), pytest.raises(UsageError, match="in use"), owned(tmp_path):
        pass
    assert len(calls) == 3


def test_the_lock_file_of_another_process_is_left_alone(tmp_path: Path):
    with owned(tmp_path):
        (tmp_path / LOCK).unlink()  # as the sentence says
        (tmp_path / LOCK).write_text("another's")
    assert (tmp_path / LOCK).read_text() == "another's"
