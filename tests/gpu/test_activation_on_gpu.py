"""The kernels of SiLU and unit length on a GPU, against XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import rms_ratio

from e88_jax import recurrence
from e88_jax.activation import activate

if refusal := recurrence.unsupported_device():
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)

from pallas_kernels import activation

BOUNDS = {"float32": 2e-6, "bfloat16": 3e-3}


def by_xla(split: activation.Split, x: jax.Array) -> tuple[jax.Array, ...]:
    keys = split.heads * split.n_state
    q, k, v, rest = jnp.split(x, [keys, 2 * keys, split.columns], axis=-1)
    q, k, v = (y.reshape(*x.shape[:2], split.heads, -1) for y in (q, k, v))
    unit = split.unit_length
    return (
        activate(q, split.silu, unit),
        activate(k, split.silu, unit),
        activate(v, split.silu, False),
        rest,
    )


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("shape", "sizes", "n_rest"),
    [
        ((8, 2048), (72, 32, 32), 72),
        ((1, 1), (3, 16, 8), 0),
        ((3, 75), (5, 64, 32), 8),
        ((2, 100), (7, 128, 24), 16),
        ((4, 33), (2, 48, 96), 0),
        ((1, 9), (16, 8, 8), 24),
        # More than 2**32 bytes.
        ((8, 40_000), (72, 32, 32), 0),
    ],
    ids=str,
)
def test_against_xla(
    shape: tuple[int, int], sizes: tuple[int, int, int], n_rest: int, dtype: str
) -> None:
    if dtype == "float32" and shape[1] > 10_000:
        pytest.skip("as many bytes already in bfloat16")
    split = activation.Split(*sizes, silu=True, unit_length=True)
    keys = jax.random.split(jax.random.key(0), 5)
    x = 2 * jax.random.normal(keys[0], (*shape, split.columns + n_rest), dtype)

    def both(function: Any) -> Any:
        results, pullback = jax.vjp(lambda x: function(split, x), x)
        d = tuple(
            jax.random.normal(key, y.shape, y.dtype)
            for key, y in zip(keys[1:], results, strict=True)
        )
        return *results[:3], *pullback(d)

    expected, actual = jax.jit(lambda: both(by_xla))(), jax.jit(lambda: both(activation.activate))()
    for name, y, wanted in zip(("q", "k", "v", "d_x"), actual, expected, strict=True):
        ratio = rms_ratio(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
        assert ratio < BOUNDS[dtype], f"{name} differs by {ratio}"


def test_mapped_and_sharded() -> None:
    split = activation.Split(2, 16, 16, silu=True, unit_length=True)
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, split.columns), "bfloat16")
    mapped = jax.vmap(lambda x: activation.activate(split, x))(x)
    for i in range(3):
        alone = activation.activate(split, x[i])
        for a, b in zip(mapped, alone, strict=True):
            np.testing.assert_array_equal(a[i], b)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    sharded = jax.jit(lambda x: activation.activate(split, x), in_shardings=rows)(x[0])
    for a, b in zip(sharded, activation.activate(split, x[0]), strict=True):
        np.testing.assert_array_equal(a, b)
