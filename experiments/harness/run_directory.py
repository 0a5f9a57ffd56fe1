"""The directory of a run: its name, its owner and `run.json`."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import e88_jax
from experiments.cli.errors import UsageError, warn
from experiments.tasks.base import Metric

from .config import TrainConfig
from .ownership import LOCK, owned

Config = TypeVar("Config", bound=TrainConfig)

RUNS = Path("runs")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "e88_jax": e88_jax.__version__, **packages}


def commit() -> str:
    """The commit that is checked out; "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def newest_run() -> Path:
    """The run under `runs/` that was started or resumed last.

    Raises:
        UsageError: there is none.
    """
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UsageError(f"there is no run under {RUNS}/: name one with --out.")
    return runs[-1].parent


def is_run(directory: Path) -> bool:
    """Whether `directory` belongs to a training run, finished, started or just claimed."""
    marks = (("run.json", {"config", "devices", "versions"}), (LOCK, {"boot", "pid"}))
    for name, keys in marks:
        try:
            values = json.loads((directory / name).read_bytes())
        except OSError:
            continue
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and keys <= values.keys():
            return True
    return (directory / "run.json").exists() and (directory / "checkpoints").exists()


def load_config(directory: Path, kind: type[Config]) -> Config:
    """The configuration, of class `kind`, that the run in `directory` was started with.

    Raises:
        UsageError: there is no run, or this version cannot read its configuration.
    """
    values = _read(directory, "config")["config"]
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise UsageError(
            f"the config in {directory / 'run.json'} is none that this version knows: "
            f"{str(error).rstrip('.')}."
        ) from None


def load_metric(directory: Path) -> Metric:
    """The metric of the run in `directory`, without its scale and function.

    Raises:
        UsageError: there is no run, or it names no metric.
    """
    values = _read(directory, "metric")["metric"]
    name, unit, better = (values.get(key) for key in ("name", "unit", "better"))
    if isinstance(name, str) and isinstance(unit, str) and better in ("lower", "higher"):
        return Metric(name, unit, better)
    raise UsageError(
        f"'metric' in {directory / 'run.json'} must have a name, a unit, and what is better, lower "
        f"or higher; got {values!r:.80}."
    )


_KINDS = {
    "config": (dict, "an object"),
    "fingerprint": (str, "a string"),
    "data": (str, "a string"),
    "metric": (dict, "an object"),
    "devices": (str, "a string"),
    "versions": (dict, "an object"),
    "resumed": (list, "a list"),
}
"""Keys read from `run.json`, each with its type in Python and in JSON."""


def _read(directory: Path, *needed: str) -> dict[str, Any]:
    path = directory / "run.json"
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{directory} holds no run (no run.json in it).") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not valid JSON.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold an object, not {json.dumps(values)[:40]}.")
    values.setdefault("resumed", [])
    for key, (kind, name) in _KINDS.items():
        if key not in values:
            if needed and key not in needed:
                continue
            raise UsageError(f"{path} lacks {key!r}.")
        if type(values[key]) is not kind:
            raise UsageError(f"{key!r} in {path} must be {name}, got {values[key]!r:.40}.")
    return values


def steps_done(directory: Path) -> int:
    """Step of the newest checkpoint in `directory`, readable or not; 0 if there is none."""
    names = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def own(config: TrainConfig) -> contextlib.AbstractContextManager[Path]:
    """The directory to train in, owned by this process while entered: see `owned` and `claim`."""
    if not config.resume:
        return claim(config.out, config.NAME, config.task.FILES)
    assert config.out is not None, "the command line names the run to resume"
    return owned(config.out)


def check_claimable(out: Path | None, files: Sequence[str] = ()) -> None:
    """Raises UsageError if `claim(out, files=files)` could not start a run there."""
    try:
        str(Path.cwd() if out is None else out.absolute()).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"--out {out}: TensorBoard needs a directory whose path is UTF-8."
        ) from None
    out = RUNS / "a new run" if out is None else out
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "is a file" if existing.exists() else "is a link to nothing"
        what = f" {what}" if existing == out else f": Not a directory, as {existing} {what}"
        raise UsageError(f"--out {out}{what}.")
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run: continue it with --resume, or choose another --out."
        )
    if existing == out and not _holds_nothing(out, files):
        raise UsageError(f"--out {out} is not empty: choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out} cannot be written: {existing} does not allow it.")


def _holds_nothing(directory: Path, files: Sequence[str]) -> bool:
    """Whether it is empty but for files of a process that was killed while claiming it."""
    left = {LOCK, *(f"{name}.partial" for name in ("run.json", *files)), *files}
    return all(path.name in left for path in directory.iterdir())


@contextlib.contextmanager
def claim(out: Path | None, name: str, files: Sequence[str] = ()) -> Iterator[Path]:
    """A directory for a new run, owned by this process while entered; removed at the end if empty.

    Args:
        out: the directory; None for a new one under `runs/`, by `name` and the time.
        name: prefix of a directory's name under `runs/`.
        files: names of files, written before `run.json`, that a killed process may have left.

    Raises:
        UsageError: `out` is a file, holds something or is in use.
    """
    check_claimable(out, files)
    directory, made = _make(out, name)
    try:
        with owned(directory):
            check_claimable(directory, files)
            yield directory
    finally:
        for empty in made:
            with contextlib.suppress(OSError):  # not empty
                empty.rmdir()


def _make(out: Path | None, name: str) -> tuple[Path, list[Path]]:
    """The directory of a new run, and the directories created for it, the deepest first."""
    if out is not None:
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        return out, made
    made = [] if RUNS.exists() else [RUNS]
    started = time.strftime(f"{name}-%Y%m%d-%H%M%S")
    for n in itertools.count(1):
        directory = RUNS / (f"{started}-{n}" if n > 1 else started)
        with contextlib.suppress(FileExistsError):  # of a process that started in the same second
            directory.mkdir(parents=True)
            return directory, [directory, *made]
    raise AssertionError


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """A context that writes an optional file: a failure is a warning."""
    try:
        yield
    except Exception as error:  # also matplotlib's and TensorBoard's
        why = error.strerror if isinstance(error, OSError) else error
        warn(f"{path} could not be written ({why}); the run goes on.")


@dataclasses.dataclass(frozen=True)
class Description:
    """Content of `run.json`, besides versions."""

    config: TrainConfig
    fingerprint: str
    """Digest of the data."""
    data: str
    """The data's size in words."""
    metric: dict[str, str]
    """Name, unit and better side of the metric."""
    parameters: int
    devices: str


def check_continues(directory: Path, now: Description) -> bool:
    """Checks that `now` continues the run in `directory`; returns whether it does so bit for bit.

    Other devices or versions give a warning, as sums are rounded otherwise.

    Raises:
        UsageError: the run began with other data.
    """
    before = _read(directory)
    if before["fingerprint"] != now.fingerprint:
        raise UsageError(
            f"the data is not that which the run in {directory} began with: "
            f"{now.data} now, {before['data']} then."
        )
    exactly = True
    for what, then, here in (
        ("on", before["devices"], now.devices),
        ("with", before["versions"], versions()),
    ):
        if then != here:
            exactly = False
            warn(f"the run began {what} {then}, not {here}: it will not continue bit for bit.")
    return exactly


def describe(directory: Path, description: Description, *, resumed_at: int | None) -> None:
    """Writes `run.json`; a resumed run keeps its entries and adds step, devices and versions."""
    config = dataclasses.replace(description.config, out=directory, resume=False).to_dict()
    values = {**dataclasses.asdict(description), "config": config, "versions": versions()}
    if resumed_at is not None:
        before = _read(directory)
        here = {"step": resumed_at, "devices": description.devices, "versions": versions()}
        values = {**before, "config": config, "resumed": [*before["resumed"], here]}
    write(directory / "run.json", json.dumps(values, indent=2).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        UsageError: it cannot be written, as on a full disk; the file stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
