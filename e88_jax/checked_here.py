"""GPUs of this machine on which `e88_jax.selfcheck` has passed: the project has run its kernels on
few kinds of GPU, and cannot vouch for another."""

import functools
import json
import os
from pathlib import Path

import jax

from e88_jax import kernels
from pallas_kernels.limits import RUN_FOR
from pallas_kernels.target import Target


def file() -> Path:
    """A JSON line for each GPU and version of JAX, in `$XDG_CACHE_HOME`, or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "e88_jax" / "checked_here.jsonl"


def only_compiled(target: Target) -> str | None:
    """A sentence if this project has compiled its kernels for the target, not run them."""
    capability = target.compute_capability
    if capability is None or capability in RUN_FOR:
        return None
    dotted = ".".join(map(str, capability))
    return f"E88's kernels have been compiled for {target.name} ({dotted}), not run."


@functools.cache
def suggest(target: Target) -> None:
    """Warns once that `selfcheck` has not passed here, where kernels have only been compiled."""
    sentence = only_compiled(target)
    if sentence is not None and not passed(target):
        kernels.log_once(f"{sentence} `python -m e88_jax.selfcheck` checks them here.")


def passed(target: Target) -> bool:
    """Whether `selfcheck` has passed here with this GPU and JAX."""
    try:
        return _line(target) in file().read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def record(target: Target) -> None:
    """Notes that `selfcheck` has passed.

    Raises:
        OSError: the file cannot be written.
    """
    if passed(target):
        return
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().open("a") as lines:
        lines.write(_line(target) + "\n")


def _line(target: Target) -> str:
    return json.dumps({"gpu": target.name, "jax": jax.__version__})
