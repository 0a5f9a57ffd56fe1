from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.naive import rms_ratio
from e88_jax.short_conv import ShortConv
from pallas_kernels import target
from tests.reference import layer as numpy_layer

BATCH, CHANNELS = 2, (2, 3)  # heads, and columns of each


def make(size: int, time: int, dtype: str) -> tuple[ShortConv, Any, Any]:
    rng = np.random.default_rng([size, time])
    conv = ShortConv(CHANNELS, size, rngs=nnx.Rngs(0))
    conv.taps[...] = jnp.asarray(rng.normal(size=(size, *CHANNELS)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(BATCH, time, *CHANNELS)), dtype)
    past = jnp.asarray(rng.normal(size=(BATCH, size - 1, *CHANNELS)), dtype)
    return conv, x, past


def flat(x: Any) -> np.ndarray:
    """`[..., channels]`, as PyTorch has them."""
    return np.asarray(x).reshape(*x.shape[: x.ndim - len(CHANNELS)], -1)


def torch_weight(conv: ShortConv) -> np.ndarray:
    return flat(conv.taps[...]).T[:, None, :]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("time", [1, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_against_numpy(size: int, time: int, packed: bool, x64: None) -> None:
    """Short and long of the taps, whose state then reaches into the call before."""
    conv, x, past = make(size, time, "float64")
    ids = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 0], [0, 1, 2, 2, 2, 2, 2, 2, 2]])[:, :time]
    expected = numpy_layer.short_conv(
        torch_weight(conv), flat(x), flat(past), ids if packed else None
    )
    y, state = jax.jit(conv)(x, past, jnp.asarray(ids) if packed else None)
    assert y.shape == x.shape
    assert rms_ratio(flat(y), expected[0]) < 1e-12
    np.testing.assert_array_equal(flat(state), expected[1])


def test_rows_end_where_they_say(x64: None) -> None:
    """The state is the last inputs before it, those of the state before included."""
    module, *inputs = make(4, 9, "float64")
    conv, (x, past) = jax.jit(module), jax.device_get(inputs)
    ids = np.asarray([[0] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    for lengths, segment_ids in (((9, 4), None), ((1, 0), None), ((2, 4), ids), ((9, 2), ids)):
        y, state = conv(x, past, segment_ids, np.asarray(lengths, np.int32))
        for b, n in enumerate(lengths):
            row = slice(b, b + 1)
            expected = past[row]
            if n > 0:
                its_ids = None if segment_ids is None else segment_ids[row, :n]
                its_y, expected = conv(x[row, :n], past[row], its_ids)
                np.testing.assert_allclose(np.asarray(y)[row, :n], its_y, rtol=1e-12)
            np.testing.assert_array_equal(np.asarray(state)[row], expected)


def test_the_future_is_not_seen() -> None:
    conv, x, past = make(4, 9, "float32")
    y, _ = conv(x, past, None)
    changed, _ = conv(x.at[:, 5:].add(1.0), past, None)
    np.testing.assert_array_equal(y[:, :5], changed[:, :5])
    assert np.all(np.asarray(y[:, 5]) != np.asarray(changed[:, 5]))


def test_initial_state_is_nothing() -> None:
    conv, _, past = make(4, 9, "float32")
    state = conv.init_state(BATCH, jnp.dtype("bfloat16"))
    assert state.shape == past.shape
    assert state.dtype == jnp.bfloat16
    assert not np.any(state)


def test_bfloat16_sums_in_float32() -> None:
    conv, x, past = make(4, 9, "bfloat16")
    y, state = conv(x, past, None)
    assert y.dtype == state.dtype == jnp.bfloat16
    wide, _ = conv(x.astype("float32"), past.astype("float32"), None)
    np.testing.assert_array_equal(y, wide.astype("bfloat16"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_gradient_on_a_gpu_is_that_of_the_convolution(
    x64: None, bias: bool, silu: bool
) -> None:
    """It is written out there: every array, with documents and without."""
    _, x, past = make(3, 4, "float64")
    rng = np.random.default_rng(1)
    conv = ShortConv(CHANNELS, 3, bias=bias, silu=silu, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)
    weigh = jnp.asarray(rng.normal(size=x.shape))

    def loss(params: Any, x: Any, past: Any, ids: Any) -> Any:
        y, state = nnx.merge(graphdef, params)(x, past, ids)
        return jnp.sum(y * weigh) + jnp.sum(state**2)

    def trace(ids: Any) -> Any:
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(params, x, past, ids)

    for ids in (None, jnp.asarray([[0, 0, 1, 1], [0, 1, 2, 2]])):
        with target.use(target.H100):
            on_a_gpu = trace(ids)
        elsewhere = trace(ids)
        assert n_equations(on_a_gpu) != n_equations(elsewhere)
        written_out, derived = (
            traced.lower().compile()(params, x, past, ids) for traced in (on_a_gpu, elsewhere)
        )
        chex.assert_trees_all_close(written_out, derived, rtol=1e-12)


def n_equations(traced: Any) -> int:
    return str(traced.jaxpr).count(" = ")


@pytest.mark.parametrize("time", [1, 128, 131, 192])
def test_gradient_on_a_gpu_of_any_length(x64: None, time: int) -> None:
    """Taps and bias are summed by pieces: one a row, or at 192 two of 96."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, time, *CHANNELS)))
    weigh = jnp.asarray(rng.normal(size=x.shape))
    conv = ShortConv(CHANNELS, 3, bias=True, silu=True, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)
    past = jnp.zeros((2, 2, *CHANNELS))

    def loss(params: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, params)(x, past)[0] * weigh)

    with target.use(target.H100):
        written_out = jax.jit(jax.grad(loss))(params)
    chex.assert_trees_all_close(written_out, jax.jit(jax.grad(loss))(params), rtol=1e-10)


def test_gradients(x64: None) -> None:
    conv, x, past = make(3, 4, "float64")
    ids = jnp.asarray([[0, 0, 1, 1], [0, 0, 0, 0]])
    weigh = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))

    @jax.jit
    def loss(x: Any, past: Any) -> Any:
        y, state = conv(x, past, ids)
        return jnp.sum(y * weigh) + jnp.sum(state**2)

    chex.assert_numerical_grads(loss, (x, past), order=1, atol=1e-8)
