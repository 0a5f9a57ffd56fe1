"""Fixtures of tests that train."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that a module starts share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> Iterator[None]:
    """Optax's optimizers raise floats to integer powers, which strict dtype promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
