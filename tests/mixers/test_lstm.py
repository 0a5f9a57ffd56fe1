"""The LSTM layer against a loop in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from e88_jax import LSTMConfig, LSTMMixer
from e88_jax.mixers.base import Execution
from e88_jax.mixers.lstm import LSTMState
from e88_jax.naive import rms_ratio
from e88_jax.optim import muon_dimensions, weight_decay_mask
from e88_jax.typed import params_by_path, set_params
from tests.reference.lstm import Weights, lstm, shapes

DIM, WIDTH, TIME = 10, 7, 31
IDS = np.array([[0] * 31, [3] * 9 + [1] + [3] * 14 + [0] * 7])


def weights_of() -> Weights:
    rng = np.random.default_rng(0)
    return {name: 0.5 * rng.normal(size=shape) for name, shape in shapes(WIDTH, DIM).items()}


def mixer_of(weights: Weights, dtype: Any = "float64") -> LSTMMixer:
    mixer = LSTMMixer(LSTMConfig(width=WIDTH), DIM, Execution(dtype=dtype), rngs=nnx.Rngs(0))
    params = params_by_path(mixer)
    assert {name: param.shape for name, param in params.items()} == shapes(WIDTH, DIM)
    set_params(mixer, {name: jnp.asarray(w) for name, w in weights.items()})
    return mixer


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, and the units' outputs and cells before it."""
    rng = np.random.default_rng(1)
    x, before = rng.normal(size=(2, TIME, DIM)), rng.uniform(-0.8, 0.8, (2, 2, WIDTH))
    return x, before[0], before[1]


def test_against_numpy(float64: None) -> None:
    """With a state, documents, and rows of two lengths."""
    weights, (x, hidden, cell) = weights_of(), inputs()
    state = LSTMState(jnp.asarray(hidden), jnp.asarray(cell))
    for mixer in (trained := mixer_of(weights), trained.for_inference()):
        y, after = nnx.jit(lambda mixer: mixer(x, state, IDS, lengths=[TIME, 19]))(mixer)
        for b, n in enumerate((TIME, 19)):
            expected = lstm(weights, x[b, :n], IDS[b, :n], hidden[b], cell[b])
            actual = y[b, :n], after.hidden[b], after.cell[b]
            for a, wanted in zip(actual, expected, strict=True):
                assert rms_ratio(a, wanted) < 1e-13
        assert not np.any(y[1, 19:])


def test_gradients_against_numpy(float64: None) -> None:
    """Differences of NumPy's loss along each gradient, through all three results."""
    weights, (x, hidden, cell) = weights_of(), inputs()
    given = {**weights, "x": x, "hidden": hidden, "cell": cell}
    rng = np.random.default_rng(2)
    cotangents = [rng.normal(size=a.shape) for a in (x, hidden, cell)]

    def loss(given: dict[str, Any]) -> Any:
        mixer = mixer_of(weights)
        set_params(mixer, {name: given[name] for name in weights})
        state = LSTMState(given["hidden"], given["cell"])
        y, after = mixer(given["x"], state, jnp.asarray(IDS))
        return sum(jnp.sum(c * a) for c, a in zip(cotangents, (y, *after), strict=True))

    def numpy_loss(given: dict[str, np.ndarray]) -> float:
        total = 0.0
        for b in range(2):
            results = lstm(given, given["x"][b], IDS[b], given["hidden"][b], given["cell"][b])
            total += sum(np.sum(c[b] * a) for c, a in zip(cotangents, results, strict=True))
        return total

    for name, slope in jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(given)).items():
        norm = np.linalg.norm(slope)
        assert norm > 1e-2, name
        direction = slope / norm + rng.normal(size=slope.shape) / np.sqrt(slope.size)
        above, below = (
            numpy_loss({**given, name: given[name] + step * direction}) for step in (1e-5, -1e-5)
        )
        measured = (above - below) / 2e-5
        assert abs(measured - np.sum(slope * direction)) < 1e-7 * norm, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes_under_strict_promotion(dtype: str) -> None:
    """The cell is in float32 in both; bfloat16 rounds the last matmul alone."""
    weights, (x, hidden, cell) = weights_of(), inputs()
    mixer = mixer_of({name: w.astype(np.float32) for name, w in weights.items()}, dtype)
    state = LSTMState(jnp.asarray(hidden, jnp.float32), jnp.asarray(cell, jnp.float32))
    run = nnx.jit(lambda mixer, *arguments: mixer(*arguments))
    y, after = run(mixer, jnp.asarray(x, jnp.float32), state, jnp.asarray(IDS))
    assert (y.dtype, after.hidden.dtype, after.cell.dtype) == (dtype, "float32", "float32")
    for b in range(2):
        expected, *expected_state = lstm(weights, x[b], IDS[b], hidden[b], cell[b])
        assert rms_ratio(y[b], expected) < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
        for actual, wanted in zip(after, expected_state, strict=True):
            assert rms_ratio(actual[b], wanted) < 1e-6


def test_a_program_of_any_batch_and_length() -> None:
    mixer = mixer_of({name: w.astype(np.float32) for name, w in weights_of().items()}, "float32")
    batch, time = export.symbolic_shape("b, t")

    def of(batch: Any, time: Any, make: Any) -> tuple[Any, LSTMState]:
        cells = (make((batch, WIDTH), "float32") for _ in range(2))
        return make((batch, time, DIM), "float32"), LSTMState(*cells)

    run = jax.jit(mixer)
    exported = export.export(run)(*of(batch, time, jax.ShapeDtypeStruct))
    exported = export.deserialize(exported.serialize())
    given = of(3, 7, jnp.ones)
    for a, b in zip(
        jax.tree.leaves(exported.call(*given)), jax.tree.leaves(run(*given)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_what_decays_and_what_muon_takes() -> None:
    params = nnx.state(mixer_of(weights_of(), "float32"), nnx.Param)
    decays, taken = weight_decay_mask(params), muon_dimensions(params)
    for path in (("cell", "dense_i"), ("cell", "dense_h"), ("output",)):
        decay, muon = decays, taken
        for name in path:
            decay, muon = decay[name], muon[name]
        assert decay["kernel"].get_raw_value() is True
        assert muon["kernel"] is not None
    assert decays["cell"]["dense_h"]["bias"].get_raw_value() is False
    assert taken["cell"]["dense_h"]["bias"] is None


def test_errors() -> None:
    mixer, x = mixer_of(weights_of(), "float32"), jnp.zeros((2, 3, DIM))
    with pytest.raises(ValueError, match=r"batch of 2, got .*float32 \(3, 7\)"):
        mixer(x, mixer.init_state(3))
    with pytest.raises(TypeError, match="state must be of type LSTMState"):
        mixer(x, (jnp.zeros((2, 7)),) * 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        LSTMConfig(width=0)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        LSTMMixer(LSTMConfig(width=7), 0, rngs=nnx.Rngs(0))
