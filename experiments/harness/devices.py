"""The devices of one machine: which are used, for what, and where compiled programs are kept."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def use_every_core() -> None:
    """Makes each processor core a JAX device, unless JAX has already started.

    XLA's threads gain nothing on operations as small as a step of the recurrence; rows of the
    batch on cores of their own do.
    """
    available = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(available(0)) if available else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        return


def keep_compiled_programs() -> None:
    """Lets a GPU's compiled programs outlive the process, in `$XDG_CACHE_HOME/e88_jax` (of
    `~/.cache`), unless JAX was told another directory. To be called before anything compiles.

    A processor's are not kept: they take seconds, and run on no older processor that shares the
    directory.
    """
    if jax.default_backend() != "gpu" or jax.config.read("jax_compilation_cache_dir"):
        return
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
