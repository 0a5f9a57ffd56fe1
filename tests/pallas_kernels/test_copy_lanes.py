"""Lane programs that copy, in NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.copy_lanes import copy_in, copy_out
from tests.reference.lane_ops_in_numpy import lane_ops, memory

Shape = tuple[int, int, int]

SHAPES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((32, 1, 32), jnp.bfloat16),
        ((8, 1, 48), jnp.bfloat16),
        ((16, 2, 32), jnp.float32),
        ((8, 4, 128), jnp.float32),
        ((24, 4, 8), jnp.bfloat16),
        ((1, 3, 64), jnp.float32),
    ],
    ids=str,
)


def some(shape: Shape, dtype: Any) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


def padded(shape: Shape, dtype: Any) -> tuple[Any, Any]:
    """Memory of this shape inside of a larger array, and the larger one, of numbers."""
    whole = memory(some((shape[0] + 1, shape[1] + 2, 2 * shape[2]), dtype))
    return whole[1:, 1:-1, shape[2] :], whole


@SHAPES
def test_copy_in(shape: Shape, dtype: Any) -> None:
    source, _ = padded(shape, dtype)
    target = memory(np.full(shape, np.nan, dtype))
    w = lane_ops()
    copy_in(w, source, target)
    w.end_of_copies()
    assert np.all(np.isnan(target.array.astype(np.float32))), "it landed before its wait"
    w.wait_for_copies(0)
    np.testing.assert_array_equal(target.array, source.array)


@SHAPES
def test_copy_in_of_an_array_that_ends(shape: Shape, dtype: Any) -> None:
    """Zeros arrive from past its end, of which nothing is read."""
    piece = 16 // np.dtype(dtype).itemsize
    steps, rows, columns = -(-shape[0] // 2), -(-shape[1] // 2), max(piece, shape[2] - 2 * piece)
    source = memory(some((steps, rows, columns), dtype))
    target = memory(np.full(shape, np.nan, dtype))
    w = lane_ops()
    copy_in(w, source, target, [w.add(w.multiply(w.thread, 0), n) for n in source.shape])
    w.end_of_copies()
    w.wait_for_copies(0)
    expected = np.zeros(shape, dtype)
    expected[:steps, :rows, :columns] = source.array
    np.testing.assert_array_equal(target.array, expected)


def test_groups_land_in_their_order() -> None:
    first, second = (some((4, 1, 32 + n), np.float32)[..., :32].copy() for n in (0, 1))
    slots = memory(np.zeros((2, 4, 1, 32), np.float32))
    w = lane_ops()
    for slot, x in enumerate((first, second)):
        copy_in(w, memory(x), slots[slot])
        w.end_of_copies()
    w.end_of_copies()  # of none
    w.wait_for_copies(2)
    np.testing.assert_array_equal(slots.array, [first, np.zeros_like(second)])
    w.wait_for_copies(1)
    np.testing.assert_array_equal(slots.array, [first, second])


def test_what_is_in_flight_cannot_be_read() -> None:
    """Nor by another lane before a barrier: the tests of kernels find such faults by these."""
    target = memory(np.zeros((4, 1, 32), np.float32))
    w = lane_ops()
    copy_in(w, memory(some((4, 1, 32), np.float32)), target)
    w.end_of_copies()
    own = w.multiply(w.thread, 4)
    with pytest.raises(AssertionError, match="not synchronized"):
        w.load(target, own, 1)
    w.wait_for_copies(0)
    with pytest.raises(AssertionError, match="not synchronized"):
        w.load(target, own, 1)
    w.synchronize()
    (words,) = w.load(target, own, 1)
    np.testing.assert_array_equal(words.view(np.float32), target.array.reshape(-1))


@SHAPES
def test_copy_out(shape: Shape, dtype: Any) -> None:
    source = memory(some(shape, dtype))
    target, whole = padded(shape, dtype)
    before = whole.array.copy()
    copy_out(lane_ops(), source, target)
    before[1:, 1:-1, shape[2] :] = source.array
    np.testing.assert_array_equal(whole.array, before)
