"""Settings that every test runs under; they must be set before JAX starts."""

import gc
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

# Four CPU devices, so that sharded programs run anywhere. Where there is no GPU, code that LLVM
# does not optimize, and in JAX 0.10, as later ones have no such flag, the older code for fusions,
# which is compiled in half the time: most of the tests' time is the compiler's. A GPU's programs
# are tested as they are used. One LLVM module per program: splitting it costs more than the small
# programs of tests gain from it. A caller's own flags are kept.
_WANTED = [
    "--xla_force_host_platform_device_count=4",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if shutil.which("nvidia-smi") is None:
    _WANTED.append("--xla_backend_optimization_level=0")
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        _WANTED.append("--xla_cpu_use_fusion_emitters=false")
for _flag in _WANTED:
    _flags = os.environ.get("XLA_FLAGS", "")
    if _flag.partition("=")[0] not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} {_flag}".strip()

import jax  # noqa: E402  (after XLA_FLAGS)

# No silent bfloat16 -> float32 and no silent broadcasting across ranks.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A program compiled by another machine or version must not be what is tested.
jax.config.update("jax_enable_compilation_cache", False)

pytest.register_assert_rewrite(
    *(f"tests.recurrence_{name}" for name in ("calls", "contract", "documents")),
    *("tests.mixers.contract", "tests.ops", "tests.reference"),
)


@pytest.fixture(autouse=True, scope="session")
def started_jax() -> None:
    """Starts JAX before the first test: later it would start with the flags of whichever test asks
    for a device first. Not on import, as the process that shares tests out would hold a GPU too."""
    jax.devices()


def pytest_collection_finish() -> None:
    """Exempts what is imported by now from garbage collection.

    Tracing allocates enough objects for frequent full collections, and each would visit the
    modules of JAX and of the tests again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


MOST_MAPS = 30_000
"""Memory maps of a process, of the 65,530 that Linux allows, above which programs are freed."""


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs() -> Iterator[None]:
    """Frees compiled programs after a module once there are many.

    Each has memory maps of its own, and XLA crashes when the system refuses another.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
