import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.projection import Projection, multiply, multiply_transposed


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def primitives(*arguments: jax.Array) -> set[str]:
    traced = jax.make_jaxpr(lambda *x: multiply_transposed(*x))(*arguments)  # anew each time
    return {str(x.primitive) for x in traced.eqns}


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (2, 3, 6), (1, 6)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_products(backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel = numbers(*shape), numbers(6, 4)
    expected = np.asarray(x) @ np.asarray(kernel)
    np.testing.assert_allclose(multiply(x, kernel), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(multiply_transposed(x, kernel.T), expected, rtol=1e-5, atol=1e-6)
    # One row on a GPU is summed.
    is_product = "dot_general" in primitives(x, kernel.T)
    assert is_product is (backend == "cpu" or x.size > 6)


def test_a_row_of_bfloat16_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, kernel = jnp.ones((1, 4096), jnp.bfloat16), jnp.full((2, 4096), 1.0078125, jnp.bfloat16)
    y = multiply_transposed(x, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.full((1, 2), 4128, jnp.bfloat16))


def test_transposed() -> None:
    init = nnx.initializers.normal()
    projection = Projection(6, 4, dtype=jnp.bfloat16, kernel_init=init, rngs=nnx.Rngs(0))
    x = numbers(2, 3, 6)
    expected = projection(x)
    projection.transpose()
    assert projection.kernel.shape == (4, 6)
    assert projection.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        projection(x).astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2
    )
