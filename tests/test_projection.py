import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.projection import Projection, multiply, multiply_transposed


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def primitives(*arguments: jax.Array) -> set[str]:
    return {str(x.primitive) for x in jax.make_jaxpr(multiply_transposed)(*arguments).eqns}


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (2, 3, 6), (1, 6), (0, 1, 6)])
def test_products(shape: tuple[int, ...]) -> None:
    x, kernel = numbers(*shape), numbers(6, 4)
    expected = np.asarray(x) @ np.asarray(kernel)
    np.testing.assert_allclose(multiply(x, kernel), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(multiply_transposed(x, kernel.T), expected, rtol=1e-5, atol=1e-6)
    # One row is summed.
    assert ("dot_general" in primitives(x, kernel.T)) is (x.size != 6)


def test_a_row_of_bfloat16_is_summed_in_float32() -> None:
    x, kernel = jnp.ones((1, 4096), jnp.bfloat16), jnp.full((2, 4096), 1.0078125, jnp.bfloat16)
    y = multiply_transposed(x, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.full((1, 2), 4128, jnp.bfloat16))
    # So is a product, which bfloat16 would round to the number that is then subtracted.
    x = jnp.asarray([[1.0078125, -1]], jnp.bfloat16)
    kernel = jnp.asarray([[1.0078125, 1.015625]], jnp.bfloat16)
    assert multiply_transposed(x, kernel).item() == 2**-14


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_for_inference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    init = nnx.initializers.normal()
    projection = Projection(6, 6, dtype=jnp.bfloat16, kernel_init=init, rngs=nnx.Rngs(0))
    x = numbers(2, 3, 6)
    expected = projection(x)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for _ in range(2):  # the second time there is nothing left to do
        projection.prepare_for_inference()
        assert projection.transposed is (backend == "gpu")
        assert projection.kernel.dtype == jnp.bfloat16
        np.testing.assert_array_equal(projection(x), expected)
