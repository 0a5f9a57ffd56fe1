"""Columns of a matmul's output that hold q, k and v, and how lanes share them. Imports no JAX."""

import dataclasses
from typing import NamedTuple

from pallas_kernels.common.sizes import LANES, THREADS
from pallas_kernels.limits import DTYPES, UnsupportedError

LOAD_BYTES = 16
"""Bytes per load; 16 is the hardware's most."""
MAX_LANE_ELEMENTS = 32
"""Most elements of a row that a lane holds."""
LOADS_IN_FLIGHT = 2
"""Loads that a lane waits for together, where a row has fewer."""
LOADS_PER_THREAD = 16
"""Loads of a thread, about: fewer thread blocks have less overhead, and the last one of each part
repeats tokens of the one before; more of them fill the GPU."""
ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Activation(NamedTuple):
    """Activation of a row: SiLU of its elements, then division by its length."""

    silu: bool
    unit_length: bool


@dataclasses.dataclass(frozen=True)
class LaneRows:
    """Rows of `size` elements over the lanes of warps; a row is one head of one token."""

    size: int
    itemsize: int

    @property
    def vector(self) -> int:
        """Elements per load."""
        return LOAD_BYTES // self.itemsize

    @property
    def lanes(self) -> int:
        """Lanes that share a row: a power of two, for shuffles."""
        loads = self.size // self.vector
        return min(LANES, loads & -loads)

    @property
    def loads(self) -> int:
        """Loads of a lane per row; those of neighbouring lanes are side by side."""
        return self.size // (self.vector * self.lanes)

    @property
    def in_flight(self) -> int:
        """Rows whose loads a lane waits for together."""
        return max(1, LOADS_IN_FLIGHT // self.loads)


class Part(NamedTuple):
    """Columns of one kind in the matmul's output: `heads` rows of each token.

    Row h is the columns from `start + h * stride` on.
    """

    name: str
    start: int
    stride: int
    heads: int
    rows: LaneRows
    activation: Activation
    given: int
    """Rows of each token that are no padding, with which the output ends where they are fewer."""

    @property
    def columns(self) -> slice:
        """From the first column of the first row to the last of the last row."""
        return slice(self.start, self.start + (self.heads - 1) * self.stride + self.rows.size)

    @property
    def n_columns(self) -> int:
        """Columns of the part alone."""
        return self.given * self.rows.size

    def tokens(self, of_all: int) -> int:
        """Tokens of a thread block."""
        loads = self.heads * self.rows.lanes * self.rows.loads
        return max(1, min(of_all, THREADS * LOADS_PER_THREAD // loads))


@dataclasses.dataclass(frozen=True)
class HeadColumns:
    """Columns of a matmul's output: q `[N]`, k `[N]` and v `[V]` of head 0, of head 1 and so on.

    After those of the last head come any others, the rest.

    Attributes:
        silu: SiLU of q, k and v.
        unit_length: division of q and k by their length plus 1e-6, for each head.
    """

    n_heads: int
    n_state: int
    n_value: int
    silu: bool
    unit_length: bool

    @property
    def of_head(self) -> int:
        """Columns of a head."""
        return 2 * self.n_state + self.n_value

    @property
    def n_columns(self) -> int:
        """Columns of all heads."""
        return self.n_heads * self.of_head

    def parts(self, n_columns: int, itemsize: int, n_rest: int = 0) -> list[Part]:
        """The parts of an output with so many columns, of which `n_rest` follow those of the heads
        and are no padding."""
        n, heads, stride = self.n_state, self.n_heads, self.of_head
        keys, values = LaneRows(n, itemsize), LaneRows(self.n_value, itemsize)
        unit = Activation(self.silu, self.unit_length)
        parts = [
            Part("q", 0, stride, heads, keys, unit, heads),
            Part("k", n, stride, heads, keys, unit, heads),
            Part("v", 2 * n, stride, heads, values, Activation(self.silu, False), heads),
        ]
        vector = LOAD_BYTES // itemsize
        if n_rows := (n_columns - self.n_columns) // vector:
            rest, as_it_is = LaneRows(vector, itemsize), Activation(False, False)
            given = self.rest_columns(n_rest, itemsize) // vector
            parts.append(Part("rest", self.n_columns, vector, n_rows, rest, as_it_is, given))
        return parts

    def rest_columns(self, n_rest: int, itemsize: int) -> int:
        """Columns of the rest in whole loads."""
        vector = LOAD_BYTES // itemsize
        return -(-n_rest // vector) * vector

    def require_supported(self, n_columns: int, dtype: str, n_rest: int) -> None:
        """Checks an output with so many columns, of which `n_rest` follow those of the heads.

        Raises:
            UnsupportedError: the kernels do not take it.
        """
        if dtype not in DTYPES:
            raise UnsupportedError(f"takes {' and '.join(DTYPES)}, got {dtype}")
        itemsize = ITEMSIZE[dtype]
        vector = LOAD_BYTES // itemsize
        for name, size in (("N", self.n_state), ("V", self.n_value), ("columns", n_columns)):
            if size % vector:
                raise UnsupportedError(f"takes {name} a multiple of {vector}, got {size}")
        if n_columns > self.n_columns and not n_rest:
            after = n_columns - self.n_columns
            raise UnsupportedError(f"takes columns after v that are read, got {after} of padding")
        for part in self.parts(n_columns, itemsize):
            if part.rows.loads * vector > MAX_LANE_ELEMENTS:
                size, name = part.rows.size, "V" if part.name == "v" else "N"
                raise UnsupportedError(
                    f"takes {name} of at most {MAX_LANE_ELEMENTS} elements a lane, got {size}"
                )
