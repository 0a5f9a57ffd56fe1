"""Attention where a query, a key or a value is not finite: who does not see it is as without it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.mixers.attention import attend

BATCH, TIME, HEADS, GROUPS, DIM = 2, 6, 4, 2, 3
DOCUMENT = np.array([0, 0, 1, 1, 2, 2])
SEEN = (DOCUMENT[:, None] == DOCUMENT[None]) & np.tril(np.ones((TIME, TIME), bool))
LOST = np.zeros((BATCH, TIME), bool)
LOST[0, 3] = True  # the last of its document, which it alone sees


@jax.jit
def results_and_gradient(arrays: Any, weights: Any) -> Any:
    """The outputs, and the gradient of those that are not `LOST`, weighed."""

    def loss(arrays: Any) -> Any:
        out = attend(**arrays, seen=jnp.asarray(SEEN)[None])
        return jnp.sum(jnp.where(LOST[:, :, None, None], 0, out * weights)), out

    gradient, out = jax.grad(loss, has_aux=True)(arrays)
    return out, gradient


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_other_tokens_and_their_gradients(name: str, value: float, x64: None) -> None:
    rng = np.random.default_rng(0)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    clean = {key: rng.normal(size=(BATCH, TIME, n, DIM)) for key, n in heads.items()}
    spoilt = {**clean, name: clean[name].copy()}
    spoilt[name][0, 3, 1, 2] = value
    weights = rng.normal(size=(BATCH, TIME, HEADS, DIM))
    out, expected = results_and_gradient(clean, weights)
    spoilt_out, got = results_and_gradient(spoilt, weights)
    assert np.all(np.isnan(spoilt_out[LOST]))
    np.testing.assert_array_equal(spoilt_out[~LOST], out[~LOST])
    for key, gradient in got.items():
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-12, atol=1e-14, err_msg=key)
