import jax
import numpy as np
import pytest

from e88_jax.projection import GPU_ROWS, multiply


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (2, 3, 6)])
def test_a_row_alone_has_company_on_a_gpu(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x = jax.numpy.asarray(rng.normal(size=shape), "float32")
    kernel = jax.numpy.asarray(rng.normal(size=(6, 4)), "float32")

    def rows() -> int:
        (product,) = (
            eqn
            for eqn in jax.make_jaxpr(lambda *x: multiply(*x))(x, kernel).eqns
            if "dot" in str(eqn.primitive)
        )
        return product.outvars[0].aval.shape[0]

    n_rows = x.size // 6
    assert rows() == n_rows
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows() == (GPU_ROWS if n_rows == 1 else n_rows)
    np.testing.assert_allclose(multiply(x, kernel), np.asarray(x) @ np.asarray(kernel), rtol=1e-5)
