"""Lane programs that copy between device and shared memory, 16 bytes of a lane at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.common.aliases import Reg
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.sizes import THREADS

PIECE = 16
"""Bytes that a lane copies at once: the most of `cp.async`."""


class _Piece(NamedTuple):
    """The 16 bytes of each lane in a round of pieces."""

    present: Reg | None
    """Whether the lane has one; None if all have."""
    first: int
    """Step of the first lane; a lane's own is `first + step`."""
    step: Reg
    row: Reg
    piece: Reg
    """Piece of the row."""

    def address(self, w: LaneOps, memory: Memory) -> Reg:
        """In an array of the same steps, rows and columns; its constant part is the round's."""
        own = w.address(memory, self.step, self.row)
        own = w.add(own, w.multiply(self.piece, PIECE))
        return w.add(own, self.first * memory.strides[0])


def _pieces(w: LaneOps, shape: Sequence[int], itemsize: int) -> Iterator[_Piece]:
    """All pieces of `[steps, rows, columns]`, whole steps in a round."""
    steps, rows, columns = shape
    of_row = columns * itemsize // PIECE
    of_step = rows * of_row
    assert of_row * PIECE == columns * itemsize, "a row is not whole pieces"
    assert of_step <= THREADS, "a step is more than a round"
    index, piece = w.divide(w.thread, of_row)
    step, row = w.divide(index, rows)
    at_once = THREADS // of_step
    for first in range(0, steps, at_once):
        lanes = min(at_once, steps - first) * of_step
        present = None if lanes == THREADS else w.less(w.thread, lanes)
        yield _Piece(present, first, step, row, piece)


def copy_in(
    w: LaneOps, source: Memory, target: Memory, inside: Sequence[Reg | None] = (None,) * 3
) -> None:
    """Starts to copy `[steps, rows, columns]` from device to shared memory.

    Args:
        source, target: rows are contiguous, begin at 16 bytes, and are a multiple of them.
        inside: steps, rows and columns that the source has, of columns a multiple of 16 bytes; None
            for all. The others of the target become zeros.
    """
    steps, rows, columns = inside
    for part in _pieces(w, target.shape, target.itemsize):
        size: Reg = PIECE
        if steps is not None:
            size = w.select(w.less(w.add(part.step, part.first), steps), size, 0)
        if rows is not None:
            size = w.select(w.less(part.row, rows), size, 0)
        if columns is not None:
            begin = w.multiply(part.piece, PIECE // target.itemsize)
            size = w.select(w.less(begin, columns), size, 0)
        to, at = part.address(w, target), part.address(w, source)

        def copy(to: Reg = to, at: Reg = at, size: Reg = size) -> None:
            w.copy_async(target, to, source, at, size)

        copy() if part.present is None else w.when(part.present, copy)


def copy_out(w: LaneOps, source: Memory, target: Memory) -> None:
    """Copies `[steps, rows, columns]` from shared to device memory, as in `copy_in`."""
    for part in _pieces(w, source.shape, source.itemsize):
        to, at = part.address(w, target), part.address(w, source)

        def copy(to: Reg = to, at: Reg = at) -> None:
            w.store(target, to, w.load(source, at, PIECE // 4))

        copy() if part.present is None else w.when(part.present, copy)
