"""SiLU and unit length of a row whose elements are spread over lanes."""

import math

from pallas_kernels.common.aliases import Reg
from pallas_kernels.common.lane_ops import LaneOps

LENGTH_EPSILON = 1e-6
"""Added to the length that a row is divided by, as in the original implementation."""
SMALLEST = 1.2e-38
"""Just above the smallest normal float32: keeps a row of zeros from dividing by zero."""


def sigmoid(w: LaneOps, x: Reg) -> Reg:
    power = w.exp2(w.fmultiply(x, w.number(-math.log2(math.e))))
    return w.reciprocal(w.fadd(w.number(1.0), power))


def silu_and_derivative(w: LaneOps, silu: bool, x: list[Reg]) -> tuple[list[Reg], list[Reg]]:
    """SiLU(x) and its derivative; without SiLU, x and ones."""
    if not silu:
        return x, [w.number(1.0)] * len(x)
    one = w.number(1.0)
    results, derivatives = [], []
    for y in x:
        s = sigmoid(w, y)
        result = w.fmultiply(y, s)
        results.append(result)
        # s + y s (1 - s)
        derivatives.append(w.fma(result, w.fma(w.negative(s), one, one), s))
    return results, derivatives


def inverse_length(w: LaneOps, lanes: int, x: list[Reg]) -> tuple[Reg, Reg]:
    """1 / (||x|| + LENGTH_EPSILON) and 1 / ||x|| of a row that so many lanes share."""
    square = dot(w, lanes, x, x)
    over = w.rsqrt(w.maximum(square, w.number(SMALLEST)))
    length = w.fmultiply(square, over)
    return w.reciprocal(w.fadd(length, w.number(LENGTH_EPSILON))), over


def dot(w: LaneOps, lanes: int, x: list[Reg], y: list[Reg]) -> Reg:
    """The dot product of two rows that so many lanes share, on each of them."""
    total = w.fmultiply(x[0], y[0])
    for a, b in zip(x[1:], y[1:], strict=True):
        total = w.fma(a, b, total)
    distance = 1
    while distance < lanes:
        total = w.fadd(total, w.shuffle_xor(total, distance))
        distance *= 2
    return total
