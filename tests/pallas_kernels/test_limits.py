import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import limits
from pallas_kernels.limits import require_supported
from pallas_kernels.recurrence import recurrence, single_step


@pytest.mark.parametrize("size", [4, 12, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_taken(size: int, dtype: str) -> None:
    require_supported(size, 4, dtype)
    require_supported(4, size, dtype)


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize(
    ("n_state", "n_value", "dtype", "refusal"),
    [
        (6, 4, "float32", "takes N a multiple of 4 up to 128, got 6"),
        (4, 10, "float32", "takes V a multiple of 4 up to 128, got 10"),
        (132, 4, "bfloat16", "takes N a multiple of 4 up to 128, got 132"),
        (4, 256, "bfloat16", "takes V a multiple of 4 up to 128, got 256"),
        (4, 4, "float16", "takes float32 and bfloat16, got float16"),
    ],
)
def test_refusals_name_the_number(
    time: int, n_state: int, n_value: int, dtype: str, refusal: str
) -> None:
    """A call is refused before a kernel is traced."""
    q = jnp.zeros((1, time, 2, n_state), dtype)
    arguments = q, q, jnp.zeros((1, time, 2, n_value), dtype), jnp.zeros((1, time, 2)), None, None

    def call(*arguments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if time == 1:
            return single_step(*arguments, linear_state=False)  # pyright: ignore[reportArgumentType]
        return recurrence(*arguments, linear_state=False, saved_state_interval=32)  # pyright: ignore[reportArgumentType]

    with pytest.raises(limits.UnsupportedError, match=f"^{refusal}$"):
        call(*arguments)


def test_limits_and_target_import_no_jax() -> None:
    program = (
        "import sys, pallas_kernels.limits, pallas_kernels.target; print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
