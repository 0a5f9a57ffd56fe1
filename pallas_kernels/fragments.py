"""A warp's part of the state of a block as the tensor cores hold it, and sums and products of it.

Keys are rows and columns of the state are columns: in each unit of 8 columns, lane 4 g + c holds
columns 2c and 2c + 1 at every eighth key. So its numbers, and pairs of them in bfloat16, are at
once an operand of the tensor cores: what is added to the state, an outer product, is theirs to
compute, and so are the gradients of q and k, sums over columns. What is float32 they take as tf32,
of 10 bits after the point. Sums over keys, which the next step waits for, are not theirs: they take
multiply-adds and exchanges between lanes.

In float32, where the tensor cores are not exact, multiply-adds and exchanges do it all.

`Fragments.exact` tells the two apart. A number for each column ("columns", below) is held as
`[unit][i]`: in float32 i is 0 and 1, for both columns of the lane. In bfloat16 i is 0 only, and the
lane holds its *own* column, 2c + (g & 1), as a sum over keys leaves it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.layouts import THREADS, WARPS, tiled

STEPS = 4
"""Steps whose gradients of q and k are summed at once: half of the 8 columns of a product."""
_HIGH = -(1 << 16)  # the mask of the upper half of a word
_SIGNS = -(1 << 31) + (1 << 15)  # and of the signs of two bfloat16


def keys_per_lane(n_keys: int) -> int:
    """Neighbouring keys that a lane holds."""
    for n in (8, 4, 2):
        if n_keys % (8 * n) == 0:
            return n
    raise ValueError(f"keys must be a multiple of 16, got {n_keys}.")


def fragment_layout(heads: int, values: int, keys: int) -> Any:
    """Of a state `[heads, values, keys]`, as `Fragments` has it."""
    n = keys_per_lane(keys)
    block_tile = heads, 8 * WARPS // heads, 8 * n
    # Lanes split the columns of a unit by 4 and the keys by 8, which vary slowest over lanes.
    return tiled((block_tile, (1, 8, 8 * n), (2, n)), (-8, -7), (-3, -4), -1)


class Fragments:
    """Where things lie, for a lane of a warpgroup that holds `[heads, values, keys]`.

    A state is `[unit][m][column]`, m counting the lane's keys. "Words" are a state as it is kept:
    pairs of bfloat16, `[unit][m]`, or float32, `[unit][m][column]` flattened alike.
    """

    def __init__(self, w: Any, heads: int, values: int, keys: int, exact: bool) -> None:
        self.w, self.heads, self.exact = w, heads, exact
        self.units = heads * values // (8 * WARPS)
        self.warps_per_head = WARPS // heads
        self.head, self.warp_of_head = w.divide(w.warp, self.warps_per_head)
        self.g, self.c = w.divide(w.lane, 4)
        self.vector = keys_per_lane(keys)
        self.n_keys = keys // 8  # of a lane
        self.n_words = self.units * self.n_keys * (2 if exact else 1)
        self.own = w.bits_and(self.g, 1)
        self.is_odd = w.equal(self.own, 1)
        half, _ = w.divide(self.g, 2)
        # The one lane of a column whose row of the second factor of a product meets it.
        gives_column = w.equal(half, self.c)
        # A factor, where a selection would take one more instruction with a change of sign: what is
        # not finite spreads to other columns.
        self._given = w.select(gives_column, w.number(1.0), w.number(0.0))
        # Selectors that put the lane's column of a pair in the lower or the upper half and zero in
        # the other; zero in both in lanes that do not give it.
        halves = [w.select(self.is_odd, *x) for x in ((0x7632, 0x7610), (0x3276, 0x1076))]
        self._halves = [w.select(gives_column, x, 0x7676) for x in halves]
        self._tiles = list(self._pairs_of_keys())

    def _pairs_of_keys(self) -> Iterator[tuple[int, int]]:
        """The keys that a product adds to, by number of the lane's: of two words, the lower ones
        and the upper ones; of one that is left over, both."""
        m = 0
        while m + 4 <= self.n_keys:
            yield from ((m, m + 2), (m + 1, m + 3))
            m += 4
        if m < self.n_keys:
            yield m, m + 1

    # Addresses

    def column(self, unit: int) -> Any:
        """The first of the two columns of this lane, in its head."""
        w = self.w
        first = w.add(w.multiply(self.warp_of_head, 8), w.multiply(self.c, 2))
        return w.add(first, 8 * self.warps_per_head * unit)

    # From and to memory

    def _row(self) -> tuple[int, int]:
        """Of words: how many of a lane lie together, and bytes from these to its next."""
        together = math.gcd(self.n_words, 4)
        return together, 4 * THREADS * together

    def load_words(self, memory: Any, *index: Any) -> list[Any]:
        """What this lane stored as the words of a row."""
        w = self.w
        together, stride = self._row()
        start = w.add(w.multiply(w.thread, 4 * together), w.address(memory, *index))
        words = []
        for i in range(self.n_words // together):
            words += w.load(memory, w.add(start, i * stride), together)
        return words

    def store_words(self, memory: Any, words: list[Any], *index: Any) -> None:
        w = self.w
        together, stride = self._row()
        start = w.add(w.multiply(w.thread, 4 * together), w.address(memory, *index))
        for i in range(self.n_words // together):
            piece = words[i * together : (i + 1) * together]
            w.store(memory, w.add(start, i * stride), piece)

    def load_keys(self, memory: Any, *index: Any) -> list[Any]:
        """This lane's keys of a row `[..., heads, keys]`, as words of memory."""
        w = self.w
        start = w.address(memory, *index, self.head, w.multiply(self.g, self.vector))
        words = []
        for tile in range(self.n_keys // self.vector):
            address = w.add(start, 8 * self.vector * tile * memory.itemsize)
            words += w.load(memory, address, self.vector * memory.itemsize // 4)
        return words

    def wide_keys(self, words: list[Any]) -> list[Any]:
        """`[m]` float32, from words of one dtype or the other."""
        return [self.w.as_float(x) for x in words] if self.exact else self._wide(words)

    def _wide(self, words: list[Any]) -> list[Any]:
        """The two bfloat16 of each word."""
        w = self.w
        return [
            w.as_float(bits) for x in words for bits in (w.shift_left(x, 16), w.bits_and(x, _HIGH))
        ]

    def load_columns(self, memory: Any, *index: Any) -> list[list[Any]]:
        """Columns of a row `[..., heads, values]` of float32."""
        return self._load_columns(memory, self.exact, *index)

    def load_both_columns(self, memory: Any, *index: Any) -> list[list[Any]]:
        """`[unit][column]`: as `load_columns` if exact."""
        return self._load_columns(memory, True, *index)

    def own_columns(self, both: list[list[Any]]) -> list[list[Any]]:
        """What `load_columns` returns, of what `load_both_columns` returned."""
        return both if self.exact else [[self.w.select(self.is_odd, b, a)] for a, b in both]

    def _load_columns(self, memory: Any, both: bool, *index: Any) -> list[list[Any]]:
        w = self.w
        start = w.address(memory, *index, self.head)
        columns = []
        for unit in range(self.units):
            column = self.column(unit)
            if not both:
                column = w.add(column, self.own)
            words = w.load(memory, w.add(start, w.multiply(column, 4)), 1 + both)
            columns.append([w.as_float(x) for x in words])
        return columns

    def store_columns(self, memory: Any, columns: list[list[Any]], *index: Any) -> None:
        """To a row `[..., heads, values]` of float32, if exact: the lanes that hold the same write
        the same."""
        w = self.w
        start = w.address(memory, *index, self.head)
        for unit, x in enumerate(columns):
            address = w.add(start, w.multiply(self.column(unit), 4))
            w.store(memory, address, [w.as_bits(x) for x in x])

    def load_d_out(self, memory: Any, *index: Any) -> list[Any]:
        """`[unit]`: both columns of the lane, of a row `[..., heads, values]` of the dtype of
        inputs: a pair in bfloat16."""
        if self.exact:
            return self.load_columns(memory, *index)
        w = self.w
        start = w.address(memory, *index, self.head)
        return [
            w.load(memory, w.add(start, w.multiply(self.column(unit), 2)), 1)[0]
            for unit in range(self.units)
        ]

    # States

    def narrow(self, state: Any) -> list[Any]:
        """A state as words."""
        w = self.w
        if self.exact:
            return [w.as_bits(x) for unit in state for columns in unit for x in columns]
        return [w.pack(*columns) for unit in state for columns in unit]

    def wide(self, words: list[Any]) -> Any:
        """Words as a state."""
        x = [self.w.as_float(x) for x in words] if self.exact else self._wide(words)
        pairs = [x[i : i + 2] for i in range(0, len(x), 2)]
        return [pairs[u * self.n_keys : (u + 1) * self.n_keys] for u in range(self.units)]

    def dot(self, x: Any, y: Any) -> Any:
        """The sum of the products of two states, of what this lane holds."""
        x, y = ([x for unit in z for columns in unit for x in columns] for z in (x, y))
        return self._sum_of_products(x, y)

    def _sum_of_products(self, x: list[Any], y: list[Any]) -> Any:
        """In two chains where one would be long."""
        w = self.w
        n_chains = 2 if len(x) >= 8 else 1
        chains: list[Any] = []
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            if i < n_chains:
                chains.append(w.fmultiply(a, b))
            else:
                chains[i % n_chains] = w.fma(a, b, chains[i % n_chains])
        return chains[0] if n_chains == 1 else w.fadd(*chains)

    def sums_over_keys(self, state: Any, k: list[Any]) -> list[list[Any]]:
        """Columns: S^T k."""
        w = self.w
        sums = [
            [self._sum_of_products([x[column] for x in unit], k) for column in range(2)]
            for unit in state
        ]
        if not self.exact:
            # Each lane gives away one of its columns and goes on with the other.
            sums = [
                [w.fadd(w.select(self.is_odd, b, a), w.exchange(w.select(self.is_odd, a, b), 4))]
                for a, b in sums
            ]
        distances = (4, 8, 16) if self.exact else (8, 16)
        return [[self.sum_over_lanes(x, *distances) for x in columns] for columns in sums]

    def sum_over_lanes(self, x: Any, *distances: int) -> Any:
        """The sum over the lanes whose numbers differ in these bits.

        Two bits at a time: one more exchange than one at a time takes, but half of the wait.
        """
        w = self.w
        while len(distances) > 1:
            (a, b), distances = distances[:2], distances[2:]
            y = w.fadd(w.exchange(x, b), w.exchange(x, a ^ b))
            x = w.fadd(w.fadd(x, w.exchange(x, a)), y)
        return w.fadd(x, w.exchange(x, distances[0])) if distances else x

    def add_outer(self, state: Any, k: list[Any], columns: list[list[Any]]) -> Any:
        """The state plus the outer product of keys and columns."""
        if self.exact:
            return self._add_outer_exactly(state, k, columns)
        w = self.w
        given = [w.fmultiply(x, self._given) for (x,) in columns]

        def add(u: int, i: int, j: int, acc: list[Any]) -> list[Any]:
            return w.multiply_add_tf32(acc, [k[i], k[j]], given[u])

        return self._add_products(state, add)

    def add_outer_of_d_out(self, state: Any, words: list[Any], d_out: list[Any]) -> Any:
        """As `add_outer`, of keys as words of memory and what `load_d_out` returned."""
        if self.exact:
            return self._add_outer_exactly(state, self.wide_keys(words), d_out)
        w = self.w
        # A word has two keys: one meets the column, the other a zero.
        given = [[w.bytes_of(pair, 0, half) for half in self._halves] for pair in d_out]

        def add(u: int, i: int, j: int, acc: list[Any]) -> list[Any]:
            low, high = words[i // 2], words[j // 2]
            if j == i + 1:
                high = w.bytes_of(high, high, 0x1032)
            return w.multiply_add(acc, [low, high], given[u][i % 2])

        return self._add_products(state, add)

    def _add_products(self, state: Any, add: Callable[[int, int, int, list[Any]], Any]) -> Any:
        """The state after `add` to each tile: the unit, two of the lane's keys, what they hold."""
        result = []
        for u, unit in enumerate(state):
            keys: list[Any] = [None] * self.n_keys
            for i, j in self._tiles:
                acc = add(u, i, j, [*unit[i], *unit[j]])
                keys[i], keys[j] = acc[:2], acc[2:]
            result.append(keys)
        return result

    def _add_outer_exactly(self, state: Any, k: list[Any], columns: list[list[Any]]) -> Any:
        w = self.w
        return [
            [[w.fma(k_m, x, s) for s, x in zip(pair, own, strict=True)] for k_m, pair in rows]
            for own, rows in zip(columns, (zip(k, u, strict=True) for u in state), strict=True)
        ]

    # Sums over columns

    def no_sums(self) -> list[list[Any]]:
        """`[m / 2]` results of a product whose 8 columns are sums for q, then for k, of 4 steps."""
        return [[self.w.number(0.0)] * 4 for _ in range(self.n_keys // 2)]

    def only(self, column: int, words: list[Any]) -> list[Any]:
        """Words in one column of a product, and zero in the others."""
        w = self.w
        selector = w.select(w.equal(self.g, column), 0x3210, 0x7654)
        return [w.bytes_of(x, 0, selector) for x in words]

    def pairs(self, column: int, columns: list[list[Any]]) -> list[Any]:
        """`[unit]`: both columns of the lane in bfloat16, in the lanes of this column."""
        w = self.w
        both = [(x, w.exchange(x, 4)) for (x,) in columns]
        # The own column of these lanes is the odd one where `column` is odd.
        return [w.pack(*(x[::-1] if column % 2 else x)) for x in both]

    def negative_pairs(self, pairs: list[Any]) -> list[Any]:
        return [self.w.bits_xor(x, _SIGNS) for x in pairs]

    def store_pairs(self, column: int, memory: Any, pairs: list[Any], *index: Any) -> None:
        """What `pairs` returned, to a row `[..., heads, values]` of bfloat16."""
        w = self.w
        start = w.address(memory, *index, self.head)

        def store() -> None:
            for unit, pair in enumerate(pairs):
                w.store(memory, w.add(start, w.multiply(self.column(unit), 2)), [pair])

        w.when(w.equal(self.g, column), store)

    def add_sums(self, sums: Any, words: list[Any], pairs: list[Any]) -> Any:
        """Adds products, on the tensor cores, of words of a state and pairs of columns."""
        sums = list(sums)
        for unit, b in enumerate(pairs):
            for i in range(self.n_keys // 2):
                first = unit * self.n_keys + 2 * i
                sums[i] = self.w.multiply_add(sums[i], words[first : first + 2], b)
        return sums

    def add_wide_sums(self, sums: Any, state: Any, words: list[Any]) -> Any:
        """As `add_sums`, of a state and words of float32, two for each unit."""
        sums = list(sums)
        for i in range(self.n_keys // 2):
            for j, x in enumerate(words):
                unit, column = divmod(j, 2)
                a = [state[unit][m][column] for m in (2 * i, 2 * i + 1)]
                sums[i] = self.w.multiply_add_tf32(sums[i], a, self.w.as_float(x))
        return sums

    def add_exact_sums(self, sums: Any, column: int, of: list[tuple[Any, Any]]) -> Any:
        """Adds sums over columns of the products of states and columns to one of the 8."""
        w, sums = self.w, [list(x) for x in sums]
        lane, slot = divmod(column, 2)
        for m in range(self.n_keys):
            pairs = [
                (x[unit][m][i], columns[unit][i])
                for x, columns in of
                for unit in range(self.units)
                for i in range(2)
            ]
            total = self._sum_of_products(*map(list, zip(*pairs, strict=True)))
            total = self.sum_over_lanes(total, 1, 2)
            total = w.select(w.equal(self.c, lane), total, w.number(0.0))
            acc, i = sums[m // 2], 2 * (m % 2) + slot
            acc[i] = w.fadd(acc[i], total)
        return sums

    def lane_sums_of(self, columns: list[list[Any]], others: list[list[Any]]) -> Any:
        """Numbers that add up over lanes to the sum of the products of columns."""
        w = self.w
        x, y = ([x for unit in z for x in unit] for z in (columns, others))
        held_by = 8 if self.exact else 4  # lanes that hold the same
        return w.fmultiply(self._sum_of_products(x, y), w.number(1 / held_by))
