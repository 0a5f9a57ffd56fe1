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
from .errors import UsageError

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


def load_config(directory: Path) -> TrainConfig:
    """The configuration that the run in `directory` was started with.

    Raises:
        UsageError: there is no run, or this version does not know its configuration.
    """
    try:
        described = json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"{directory} holds no run (no run.json in it).") from None
    except ValueError:
        raise UsageError(f"{directory / 'run.json'} is not valid JSON.") from None
    try:
        return TrainConfig.from_dict(described["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{directory / 'run.json'} is of another version of this program: {error}."
        ) from None


def load_corpus_fingerprint(directory: Path) -> str:
    """The fingerprint of the corpus that the run in `directory` was started with."""
    return json.loads((directory / "run.json").read_text())["corpus"]["fingerprint"]


def claim(out: Path | None) -> Path:
    """A directory for a new run.

    Raises:
        UsageError: `out` exists and is not an empty directory.
    """
    if out is None:
        out = RUNS / time.strftime("byte-lm-%Y%m%d-%H%M%S")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file.")
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run: continue it with --resume, or choose another --out."
        )
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def describe(directory: Path, config: TrainConfig, **facts: Any) -> None:
    """Writes `run.json`: configuration, versions, machine, and `facts`."""
    description = {
        "config": dataclasses.replace(config, out=directory, resume=False).to_dict(),
        "versions": versions(),
        **facts,
    }
    partial = directory / "run.json.partial"
    partial.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(partial, directory / "run.json")
