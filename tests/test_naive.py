"""The NumPy loop that everything is held to, held to numbers by hand and to finite differences."""

import itertools
from typing import Any

import numpy as np
import pytest

from e88_jax import naive
from e88_jax.naive import Inputs, Step, rms_ratio, step

OPTIONS = ("write_gate", "initial_state", "segment_ids", "linear_state")


def make_inputs(options: tuple[str, ...]) -> Inputs:
    rng = np.random.default_rng(0)
    batch, time, heads, n_state, n_value = 2, 4, 2, 3, 2
    arrays: dict[str, Any] = {
        "q": rng.normal(size=(batch, time, heads, n_state)),
        "k": rng.normal(size=(batch, time, heads, n_state)),
        "v": rng.normal(size=(batch, time, heads, n_value)),
        "decay": rng.uniform(0.5, 1, (batch, time, heads)),
        "write_gate": rng.uniform(0.3, 1, (batch, time, heads)),
        "initial_state": rng.uniform(-0.5, 0.5, (batch, heads, n_state, n_value)),
        "segment_ids": np.array([[0, 0, 1, 1], [3, 3, 3, 0]]),
        "linear_state": True,
    }
    return Inputs(**{x: arrays[x] for x in arrays if x not in OPTIONS or x in options})


def test_a_step_by_hand() -> None:
    """N = 2, V = 1: r = 0.5, d = 0.5 * (1.5 - 0.5) = 0.5, P = 0.8 S + k d."""
    S = np.array([[0.5], [-0.25]])
    x = Step(
        np.array([1.0, 2.0]), np.array([1.0, 0.0]), np.array([1.5]), np.array(0.8), np.array(0.5)
    )
    P = np.array([[0.9], [-0.2]])
    after, out = step(S, x, linear_state=True)
    np.testing.assert_allclose(after, P)
    np.testing.assert_allclose(out, [0.5])
    after, out = step(S, x, linear_state=False)
    np.testing.assert_allclose(after, np.tanh(P))
    np.testing.assert_allclose(out, [np.tanh(0.9) - 2 * np.tanh(0.2)])


@pytest.mark.parametrize(
    "options", [x for n in range(5) for x in itertools.combinations(OPTIONS, n)], ids="+".join
)
def test_gradients_are_finite_differences(options: tuple[str, ...]) -> None:
    inputs = make_inputs(options)
    rng = np.random.default_rng(1)
    result = naive.run(inputs)
    d_out, d_state = (rng.normal(size=x.shape) for x in (result.out, result.final_state))

    def loss(inputs: Inputs) -> float:
        result = naive.run(inputs)
        return float(np.sum(result.out * d_out) + np.sum(result.final_state * d_state))

    gradients = naive.gradients(inputs, d_out, d_state)._asdict()
    for name in ("q", "k", "v", "decay", "write_gate", "initial_state"):
        x, gradient = getattr(inputs, name), gradients[name]
        assert (x is None) == (gradient is None)
        if x is None:
            continue
        direction, small = rng.normal(size=x.shape), 1e-5
        ahead, behind = (
            loss(inputs._replace(**{name: x + sign * small * direction})) for sign in (1, -1)
        )
        assert np.sum(gradient * direction) == pytest.approx(
            (ahead - behind) / (2 * small), rel=1e-6
        )


def test_a_document_starts_from_zeros() -> None:
    inputs = make_inputs(("initial_state", "segment_ids"))
    whole = naive.run(inputs)
    q, k, v, decay = (x[:1, 2:] for x in (inputs.q, inputs.k, inputs.v, inputs.decay))
    after = Inputs(q, k, v, decay)
    np.testing.assert_array_equal(naive.run(after).out, whole.out[:1, 2:])
    assert np.any(whole.out[0, 0] != naive.run(inputs._replace(initial_state=None)).out[0, 0])


def test_the_ratio_of_zeros() -> None:
    assert rms_ratio([3.0, 4.1], [3.0, 4.0]) == pytest.approx(0.02)
    assert rms_ratio([0.0], [0.0]) == 0
    assert rms_ratio([1e-9], [0.0]) == np.inf
