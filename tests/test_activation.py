import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.activation import l2_normalize


class TestL2Normalize:
    def test_against_numpy(self, x64: None) -> None:
        x = (
            np.random.default_rng(0).normal(size=(3, 2, 5))
            * np.array([1e-6, 1, 1e6])[:, None, None]
        )
        expected = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
        f = jax.jit(l2_normalize)
        np.testing.assert_allclose(f(x), expected, rtol=1e-12)
        chex.assert_numerical_grads(f, (jnp.asarray(x[1:2]),), order=1, atol=1e-8)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_zero_rows(self, dtype: str) -> None:
        x = jnp.asarray([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype)

        @jax.jit
        def value_and_gradient(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, pullback = jax.vjp(l2_normalize, x)
            return y, *pullback(jnp.ones_like(y))

        y, gradient = map(np.asarray, value_and_gradient(x))
        assert y.dtype == gradient.dtype == jnp.dtype(dtype)
        assert not np.any(y[0])
        np.testing.assert_allclose(y[1].astype("float32"), [0.6, 0, 0.8], rtol=4e-3)
        chex.assert_tree_all_finite(gradient)

    def test_bfloat16_sums_in_float32(self) -> None:
        # 4096 equal squares: a bfloat16 sum would stop growing at 256.
        y = l2_normalize(jnp.ones((1, 4096), "bfloat16"))
        np.testing.assert_allclose(y.astype("float32"), 1 / 64, rtol=1e-2)
