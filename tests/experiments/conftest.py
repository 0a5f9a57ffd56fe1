"""Fixtures of tests that train."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs of a module are compiled once for this process and those that it starts."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    flags = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: jax.config.values[name] for name in flags}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        _set(flags)
        yield
        _set(before)


def _set(flags: dict[str, object]) -> None:
    for name, value in flags.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> Iterator[None]:
    """Optax's optimizers raise floats to integer powers, which strict dtype promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
