"""The NumPy loops that the ops are held to, held to numbers by hand and to finite differences."""

from typing import Any

import numpy as np
import pytest

from tests.ops.inputs import OPS, Op, Size, expected, make_call
from tests.reference import linear_recurrence
from tests.reference.linear_recurrence import Heads


def test_two_steps_by_hand() -> None:
    """K = 2, V = 1, one head. By the delta rule, from S = (0.5, -0.25) and with a decay of 1/2:

    k = (1, 0), beta = 1/2, v = 1:  S = (0.25, -0.125) + k (1 - 0.25) / 2 = (0.625, -0.125)
    k = (0, 1), beta = 2, v = 0:    S = (0.3125, -0.0625) + k 2 (0.0625) = (0.3125, 0.0625)
    """
    x = Heads(
        q=np.array([[[[1.0, 2.0]], [[1.0, 2.0]]]]),
        k=np.array([[[[1.0, 0.0]], [[0.0, 1.0]]]]),
        v=np.array([[[[1.0]], [[0.0]]]]),
        log_decay=np.full((1, 2, 1), np.log(0.5)),
        write_gate=np.array([[[0.5], [2.0]]]),
        initial_state=np.array([[[[0.5], [-0.25]]]]),
    )
    rows = linear_recurrence.rows_of(1, 2, None, None)
    by_delta_rule = linear_recurrence.run(x, rows, delta_rule=True)
    np.testing.assert_allclose(by_delta_rule.out.ravel(), [0.375, 0.4375])
    np.testing.assert_allclose(by_delta_rule.final_state.ravel(), [0.3125, 0.0625])
    # Without: (0.25, -0.125) + k / 2 = (0.75, -0.125), then half of it.
    without = linear_recurrence.run(x, rows, delta_rule=False)
    np.testing.assert_allclose(without.out.ravel(), [0.5, 0.25])
    np.testing.assert_allclose(without.final_state.ravel(), [0.375, -0.0625])


def test_rows_by_hand() -> None:
    """An id that comes back is a new document, and step 0 starts none."""
    rows = linear_recurrence.rows_of(2, 4, [[5, 5, 2, 5], [1, 1, 1, 1]], [3, 0])
    assert rows.starts.tolist() == [[False, False, True, False], [False] * 4]
    assert rows.live.tolist() == [[True, True, True, False], [False] * 4]


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_are_finite_differences(op: Op) -> None:
    call = make_call(op, Size(3, 7, 2, 4, 3, 2))
    assert call.lengths is not None
    assert call.lengths.min() < 7
    d_out, d_final_state = call.cotangents

    def loss(arrays: Any) -> float:
        results = expected(op, call._replace(arrays=arrays))
        return float(
            np.sum(results["out"] * d_out) + np.sum(results["final_state"] * d_final_state)
        )

    rng, results, small = np.random.default_rng(0), expected(op, call), 1e-5
    for name, x in call.arrays.items():
        direction = rng.normal(size=x.shape)
        ahead, behind = (
            loss(call.arrays | {name: x + sign * small * direction}) for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * small)
        assert np.sum(results[f"d_{name}"] * direction) == pytest.approx(slope, rel=1e-7), name
