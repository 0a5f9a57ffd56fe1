"""The devices of one machine: which are used, for what, and where compiled programs are kept."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GPU_MEMORY_FRACTION = "0.93"
"""Of a GPU's memory, what JAX takes at once; its own 0.75 would leave out what a large batch needs.
Some hundred MB must be left to CUDA and its libraries."""


def set_up() -> None:
    """Settings of JAX for models, unless the user or JAX has others already.

    - Each processor core is a JAX device: XLA's threads gain nothing on operations as small as a
      step of the recurrence; rows of the batch on cores of their own do.
    - JAX may use nearly all of a GPU's memory.
    - A GPU's compiled programs outlive the process, in `$XDG_CACHE_HOME/e88_jax` (of `~/.cache`). A
      processor's take seconds, and might not run on another that shares the directory.
    """
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the second is older
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = GPU_MEMORY_FRACTION
    available = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(available(0)) if available else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores)
    chosen: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if jax.default_backend() == "gpu" and chosen is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "e88_jax"))


class Placement(NamedTuple):
    """Where arrays live."""

    everywhere: NamedSharding
    """Each device has a copy."""
    by_row: NamedSharding
    """Arrays `[passes, rows, ...]`: each device has its share of the rows."""

    def __str__(self) -> str:
        return f"{self.everywhere.num_devices} x {jax.devices()[0].device_kind}"

    def put_rows(self, x: np.ndarray) -> jax.Array:
        """`[passes, rows, ...]` by row if each device can have as many rows, else everywhere."""
        divisible = x.shape[1] % self.everywhere.num_devices == 0
        return jax.device_put(x, self.by_row if divisible else self.everywhere)


def placement(rows: int) -> Placement:
    """Over as many devices as divide `rows` evenly."""
    devices = jax.devices()
    n = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    mesh = Mesh(np.array(devices[:n]), ("rows",))
    return Placement(
        NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "rows"))
    )
