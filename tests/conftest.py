"""Settings that every test runs under; they must be set before JAX starts."""

import os
from collections.abc import Iterator

import pytest

# Four CPU devices, so that sharded programs run anywhere. A caller's own flags are kept.
_DEVICES = "--xla_force_host_platform_device_count=4"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import jax  # noqa: E402  (after XLA_FLAGS)

# No silent bfloat16 -> float32 and no silent broadcasting across ranks.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A program compiled by another machine or version must not be what is tested.
jax.config.update("jax_enable_compilation_cache", False)

pytest.register_assert_rewrite("numpy_layer", "numpy_reference", "recurrence_contract")


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
