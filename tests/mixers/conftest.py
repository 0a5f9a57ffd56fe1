from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 for a whole layer; nnx.RMSNorm does not take it under strict promotion."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield
