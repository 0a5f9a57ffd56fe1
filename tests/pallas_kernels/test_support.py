import jax
import jax.numpy as jnp
import pytest

from e88_jax import recurrence
from e88_jax.recurrence import e88_recurrence
from pallas_kernels import unsupported


@pytest.mark.parametrize("size", [4, 12, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_taken(size: int, dtype: str) -> None:
    assert unsupported(size, 4, jnp.dtype(dtype)) is None
    assert unsupported(4, size, jnp.dtype(dtype)) is None


@pytest.mark.parametrize(
    ("n_state", "n_value", "dtype", "refusal"),
    [
        (6, 4, "float32", "N a multiple of 4 up to 128, got 6"),
        (4, 10, "float32", "V a multiple of 4 up to 128, got 10"),
        (132, 4, "bfloat16", "N a multiple of 4 up to 128, got 132"),
        (4, 256, "bfloat16", "V a multiple of 4 up to 128, got 256"),
        (4, 4, "float64", "float32 and bfloat16, got float64"),
    ],
)
def test_refusals_name_the_number(n_state: int, n_value: int, dtype: str, refusal: str) -> None:
    assert refusal in str(unsupported(n_state, n_value, jnp.dtype(dtype)))


class Gpu:
    platform = "gpu"
    device_kind = "some GPU"

    def __init__(self, compute_capability: str) -> None:
        self.compute_capability = compute_capability


@pytest.mark.parametrize("capability", ["7.5", "8.9", "12.0", "12.1", "gfx90a"])
def test_gpus_that_lack_copies_or_memory_are_refused(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(NotImplementedError, match=rf"9\.0 or later.*{capability}.*'scan'"):
        e88_recurrence(x, x, x, jnp.zeros((1, 2, 1)), implementation="mosaic_gpu")


@pytest.mark.parametrize("capability", ["9.0", "10.0", "10.3"])
def test_hopper_and_datacenter_blackwell_are_taken(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])
    assert recurrence.unsupported_device() is None
    x = jnp.zeros((1, 2, 1, 6))
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*got 6.*scan"):
        e88_recurrence(x, x, x, jnp.zeros((1, 2, 1)), implementation="mosaic_gpu")
