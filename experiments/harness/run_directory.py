"""The directory of a run: chosen, claimed and described by `run.json`."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import e88_jax

from .config import TrainConfig
from .errors import UsageError, warn

RUNS = Path("runs")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "e88_jax": e88_jax.__version__, **packages}


def newest_run() -> Path:
    """The run under `runs/` that was started last.

    Raises:
        UsageError: there is none.
    """
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UsageError(f"there is no run under {RUNS}/: name one with --out.")
    return runs[-1].parent


def is_run(directory: Path) -> bool:
    """Whether `directory` is that of a training run, started or finished."""
    try:
        values = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):  # no file, or cut short
        return (directory / "run.json").exists() and (directory / "checkpoints").exists()
    return isinstance(values, dict) and {"config", "corpus"} <= values.keys()


def load_config(directory: Path) -> TrainConfig:
    """The configuration that the run in `directory` was started with.

    Raises:
        UsageError: there is no run, or this version does not know its configuration.
    """
    try:
        return TrainConfig.from_dict(_read(directory)["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{directory / 'run.json'} is of another version of this program: {error}."
        ) from None


def _read(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{directory} holds no run (no run.json in it).") from None
    except ValueError:
        raise UsageError(f"{directory / 'run.json'} is not valid JSON.") from None


def steps_done(directory: Path) -> int:
    """Step of the newest checkpoint in `directory`, readable or not; 0 if there is none."""
    names = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_claimable(out: Path | None) -> None:
    """Raises UsageError if `claim(out)` could not make a new run there."""
    out = _new_run() if out is None else out
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "is a file" if existing.exists() else "is a link to nothing"
        what = f" {what}" if existing == out else f": Not a directory, as {existing} {what}"
        raise UsageError(f"--out {out}{what}.")
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run: continue it with --resume, or choose another --out."
        )
    if existing == out and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out} cannot be written: {existing} does not allow it.")


def claim(out: Path | None) -> Path:
    """A directory for a new run.

    Raises:
        UsageError: `out` exists and is not an empty directory.
    """
    check_claimable(out)
    out = _new_run() if out is None else out
    if not out.exists():
        out.mkdir(parents=True)
    return out


def _new_run() -> Path:
    return RUNS / time.strftime("byte-lm-%Y%m%d-%H%M%S")


@dataclasses.dataclass(frozen=True)
class Description:
    """What `run.json` says of a run, besides versions."""

    config: TrainConfig
    corpus: str
    """Fingerprint of the data."""
    corpus_bytes: int
    parameters: int
    devices: str


def check_continues(directory: Path, now: Description) -> None:
    """Holds the run in `directory` against what would continue it.

    A different machine only gets a warning: sums are then rounded otherwise.

    Raises:
        UsageError: the run began with another corpus.
    """
    before = _read(directory)
    if before["corpus"] != now.corpus:
        raise UsageError(
            f"the corpus is not the one that the run in {directory} began with: "
            f"{now.corpus_bytes:,} bytes now, {before['corpus_bytes']:,} then."
        )
    for what, then, here in (
        ("on", before["devices"], now.devices),
        ("with", before["versions"], versions()),
    ):
        if then != here:
            warn(f"the run began {what} {then}, not {here}: it will not continue bit for bit.")


def describe(directory: Path, description: Description, *, resumed_at: int | None) -> None:
    """Writes `run.json`; a resumed run keeps what it said and adds where and how it went on."""
    config = dataclasses.replace(description.config, out=directory, resume=False).to_dict()
    values = {**dataclasses.asdict(description), "config": config, "versions": versions()}
    if resumed_at is not None:
        before = _read(directory)
        here = {"step": resumed_at, "devices": description.devices, "versions": versions()}
        values = {**before, "config": config, "resumed": [*before.get("resumed", []), here]}
    partial = directory / "run.json.partial"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(directory / "run.json")
