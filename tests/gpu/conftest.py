"""The kernels as another GPU takes them, on the GPU at hand."""

import contextlib
from collections.abc import Iterator

import pytest

from e88_jax import hardware
from pallas_kernels import target

OPTION = "--as-gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION,
        choices=[gpu.key for gpu in hardware.GPUS],
        help="build the kernels of tests/gpu as this GPU takes them, by its copies, shared memory "
        "and number of SMs",
    )


@pytest.fixture(autouse=True)
def built_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Builds the kernels for the GPU of `--as-gpu`; for the one at hand without it."""
    key = request.config.getoption(OPTION, default=None)
    with target.use(hardware.find_gpu(key).target) if key else contextlib.nullcontext():
        yield
