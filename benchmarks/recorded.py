"""Results files, and what tables say of where their numbers come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[1]
STEP_GPU = "benchmarks/results/train_step_h100.json"
N_STATE = "experiments/results/n_state_scaling_h100/results.json"

Record: TypeAlias = Mapping[str, Any]
"""An object of a results file."""


def read(path: str) -> Record:
    """A results file."""
    return json.loads((ROOT / path).read_text())


def provenance(result: Record, *passes: Record) -> str:
    """Device, clock, versions, date and commit: those of them that the file has."""
    device = result.get("device") or result["devices"]
    clocks = [x["clock_mhz"] for x in passes if x.get("clock_mhz") is not None]
    jax = result.get("jax") or result["versions"]["jax"]
    said = [device]
    if clocks:
        low, high = min(clocks), max(clocks)
        said.append(f"{low:.0f} MHz" if low == high else f"{low:.0f} to {high:.0f} MHz")
    said.append(f"JAX {jax}")
    if "date" in result:
        said.append(result["date"][:10])
    if "commit" in result:
        said.append(f"commit {result['commit']}")
    return ", ".join(said)


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def block(about: str, command: str, table: str) -> str:
    """Device and versions, command, and table."""
    return f"{about}:\n\n    {command}\n\n{table}"


def passes(shape: Record) -> tuple[Record, Record, Record]:
    """Forward, backward, and both, of a shape of `benchmarks.recurrence`."""
    of_shape = shape["passes"]
    return of_shape["forward"], of_shape["backward"], of_shape["forward+backward"]


def about_recurrence(result: Record) -> str:
    """`provenance` of a file of `benchmarks.recurrence`."""
    return provenance(result, *(x for shape in result["shapes"] for x in passes(shape)))
