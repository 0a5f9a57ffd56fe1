"""The devices of one machine: settings of JAX."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

from experiments.cli.errors import UsageError, warn
from pallas_kernels import target

GPU_MEMORY_FRACTION = "0.93"
"""Fraction of a GPU's memory that JAX preallocates. Its default of 0.75 is too little for a large
batch; CUDA and its libraries need some hundred MB."""

_MEMORY_SETTINGS = tuple(
    f"XLA_{client}_{setting}"
    for client in ("CLIENT", "PYTHON_CLIENT")
    for setting in ("MEM_FRACTION", "PREALLOCATE", "ALLOCATOR")
)
SPARE_THREADS = 2
"""Threads of XLA on a CPU beyond one for each device. In an all-reduce every device's thread waits
for the others; a program that another thread of the trainer runs meanwhile, as a task may to draw
its sequences, needs one thread and one more for its parts, else all wait for ever."""
_XLA_THREADS = "PJRT_NPROC"
"""Variable with the number of XLA's threads on a CPU."""
_CPU_LIMITS = _XLA_THREADS, "PYTHON_CPU_COUNT"
"""Variables by which users limit the CPU cores of XLA and of Python."""
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit: microseconds of CPU time per period of microseconds."""


def set_up() -> None:
    """Sets up JAX, except where the user has chosen or JAX has started.

    - Each CPU core of the process is a JAX device: XLA's threads gain nothing on operations as
      small as a step of the recurrence; rows of the batch on separate cores do. XLA has
      `SPARE_THREADS` more threads, also beyond a number in PJRT_NPROC, which then limits devices.
    - JAX may use nearly all of a GPU's memory.
    - Programs compiled for a GPU are cached in `$XDG_CACHE_HOME/e88_jax` (or `~/.cache`). Those for
      a CPU compile in seconds, and might not run on another CPU that shares the directory.

    Raises:
        UsageError: JAX has no device of the kind that the user chose.
    """
    if not any(os.environ.get(name) for name in _MEMORY_SETTINGS):
        os.environ[_MEMORY_SETTINGS[0]] = GPU_MEMORY_FRACTION
    settings: Any = jax.config
    chosen = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if settings.jax_num_cpu_devices < 0 and not chosen:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", n := cores())
            if n > 1:
                os.environ[_XLA_THREADS] = str(n + SPARE_THREADS)
    if (
        platform() == "gpu"
        and settings.jax_compilation_cache_dir is None
        and (directory := _cache_directory()) is not None
    ):
        jax.config.update("jax_compilation_cache_dir", str(directory))


def platform() -> str:
    """Kind of the devices that JAX computes on: "cpu", "gpu" or "tpu".

    Raises:
        UsageError: JAX has no device of the kind that the user chose.
    """
    try:
        return target.current().platform
    except (RuntimeError, AssertionError) as error:  # the second without a message
        why = str(error).partition("\n")[0] or "no such device, or no plugin of JAX for it."
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"JAX cannot start (JAX_PLATFORMS={asked!r}): {why}") from None


def cores() -> int:
    """CPU cores that this process may use."""
    available = getattr(os, "sched_getaffinity", None)  # Linux only
    n = len(available(0)) if available else os.cpu_count() or 1
    for name in _CPU_LIMITS:
        if (limit := os.environ.get(name, "")).isdecimal():
            n = min(n, int(limit))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, _CPU_QUOTA.read_text().split())
        n = min(n, round(quota / period))
    return max(1, n)


def _cache_directory() -> Path | None:
    """Directory of compiled programs; None, with a warning, if it cannot be written."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(caches) / "e88_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if writable:
        return directory
    if jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        warn(
            f"compiled programs are not kept for the next run, as {directory} cannot be written: "
            "JAX_COMPILATION_CACHE_DIR names another directory."
        )
    return None
