"""A warp's part of a block's state as fragments of the tensor cores, with sums and mmas of it.

Keys are the rows and columns of the state the columns of an mma: in each n-tile of 8 columns, lane
4 g + c holds columns 2c and 2c + 1 at every eighth key. So its elements are an accumulator, and
pairs of them in bfloat16 an operand, as they lie. The tensor cores add outer products to the state
and compute the gradients of q and k, sums over columns; they take float32 operands as tf32, with 10
bits after the point. Sums over keys, which the next step waits for, are FMAs and shuffles: their
latency is lower.

In float32 (`Fragments.exact`), where the tensor cores are not exact, all is FMAs and shuffles.

A number for each column ("columns", below) is held as `[n-tile][i]`. In float32, i is 0 and 1 for
both columns of the lane. In bfloat16 i is 0 only, for the lane's *own* column 2c + (g & 1), where a
sum over keys leaves it.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

from pallas_kernels.common.aliases import Layout, Reg
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.mosaic import tiled_layout
from pallas_kernels.common.sizes import THREADS, WARPS

State: TypeAlias = list[list[list[Reg]]]
"""`[n-tile][m][column]` in float32, m counting the lane's keys."""
Words: TypeAlias = list[Reg]
"""A state as it is stored: pairs of bfloat16, `[n-tile][m]`, or float32, `[n-tile][m][column]`,
flattened; or the keys of a lane, likewise."""
Columns: TypeAlias = list[list[Reg]]
"""A float32 number for each column, `[n-tile][i]`."""
Accumulators: TypeAlias = list[list[Reg]]
"""`[m / 2]` accumulators of an mma; their 8 columns are sums for q, then for k, in 4 steps."""

MMA_STEPS = 4
"""Steps whose gradients of q and k one mma sums: 4 of its 8 columns for each."""
_HIGH = -(1 << 16)
"""Mask of the upper half of a word."""
_SIGNS = -(1 << 31) + (1 << 15)
"""Mask of the signs of two bfloat16."""


def keys_per_lane(n_keys: int) -> int:
    """Neighbouring keys that a lane holds."""
    for n in (8, 4, 2):
        if n_keys % (8 * n) == 0:
            return n
    raise ValueError(f"keys must be a multiple of 16, got {n_keys}.")


def fragment_layout(heads: int, values: int, keys: int) -> Layout:
    """Pallas's layout of a state `[heads, values, keys]` that `Fragments` holds."""
    n = keys_per_lane(keys)
    block_tile = heads, 8 * WARPS // heads, 8 * n
    # 4 lanes split the columns of an n-tile and 8 the keys, which vary slowest over lanes.
    return tiled_layout((block_tile, (1, 8, 8 * n), (2, n)), (-8, -7), (-3, -4), -1)


class Fragments:
    """Fragments of a lane of a warpgroup that holds a state `[heads, values, keys]`."""

    def __init__(self, w: LaneOps, heads: int, values: int, keys: int, exact: bool) -> None:
        self.w, self.heads, self.exact = w, heads, exact
        self.n_tiles = heads * values // (8 * WARPS)
        self.warps_per_head = WARPS // heads
        self.head, self.warp_of_head = w.divide(w.warp, self.warps_per_head)
        self.g, self.c = w.divide(w.lane, 4)
        self.vector = keys_per_lane(keys)
        self.lane_keys = keys // 8
        self.n_words = self.n_tiles * self.lane_keys * (2 if exact else 1)
        self.own = w.bits_and(self.g, 1)
        self.is_odd = w.equal(self.own, 1)
        half, _ = w.divide(self.g, 2)
        # The one lane of a column that gives it to the second operand of an mma.
        gives_column = w.equal(half, self.c)
        # A factor saves the instruction of a select where the sign changes; what is not finite
        # spreads to other columns.
        self._given = w.select(gives_column, w.number(1.0), w.number(0.0))
        # `prmt` selectors that put the lane's own column of a pair in the lower or the upper half
        # and zero in the other; zero in both in lanes that do not give it.
        halves = [w.select(self.is_odd, *x) for x in ((0x7632, 0x7610), (0x3276, 0x1076))]
        self._halves = [w.select(gives_column, x, 0x7676) for x in halves]
        self._key_pairs = list(self._pairs_of_keys())

    def _pairs_of_keys(self) -> Iterator[tuple[int, int]]:
        """The pairs of the lane's keys that one mma adds to: of two words the lower keys and the
        upper ones, of a word that is left over both."""
        m = 0
        while m + 4 <= self.lane_keys:
            yield from ((m, m + 2), (m + 1, m + 3))
            m += 4
        if m < self.lane_keys:
            yield m, m + 1

    # Memory

    def column(self, tile: int) -> Reg:
        """The first of the lane's two columns of an n-tile, in its head."""
        w = self.w
        first = w.add(w.multiply(self.warp_of_head, 8), w.multiply(self.c, 2))
        return w.add(first, 8 * self.warps_per_head * tile)

    def _row(self) -> tuple[int, int]:
        """Words of a lane that lie together in memory, and bytes to its next ones."""
        together = math.gcd(self.n_words, 4)
        return together, 4 * THREADS * together

    def load_words(self, memory: Memory, *index: Reg) -> Words:
        """The words that this lane stored by `store_words`."""
        w = self.w
        together, stride = self._row()
        start = w.add(w.multiply(w.thread, 4 * together), w.address(memory, *index))
        words: Words = []
        for i in range(self.n_words // together):
            words += w.load(memory, w.add(start, i * stride), together)
        return words

    def store_words(self, memory: Memory, words: Words, *index: Reg) -> None:
        """Stores a state in a row of memory, each lane's words in an order of its own."""
        w = self.w
        together, stride = self._row()
        start = w.add(w.multiply(w.thread, 4 * together), w.address(memory, *index))
        for i in range(self.n_words // together):
            piece = words[i * together : (i + 1) * together]
            w.store(memory, w.add(start, i * stride), piece)

    def load_keys(self, memory: Memory, *index: Reg) -> Words:
        """This lane's keys of a row `[..., heads, keys]`."""
        w = self.w
        start = w.address(memory, *index, self.head, w.multiply(self.g, self.vector))
        words: Words = []
        for tile in range(self.lane_keys // self.vector):
            address = w.add(start, 8 * self.vector * tile * memory.itemsize)
            words += w.load(memory, address, self.vector * memory.itemsize // 4)
        return words

    def wide_keys(self, words: Words) -> list[Reg]:
        """`[m]` float32, from words of either dtype."""
        return [self.w.as_float(x) for x in words] if self.exact else self._wide(words)

    def _wide(self, words: Words) -> list[Reg]:
        """The two bfloat16 of each word in float32."""
        w = self.w
        return [
            w.as_float(bits) for x in words for bits in (w.shift_left(x, 16), w.bits_and(x, _HIGH))
        ]

    def load_columns(self, memory: Memory, *index: Reg) -> Columns:
        """Columns of a row `[..., heads, values]` of float32."""
        return self._load_columns(memory, self.exact, *index)

    def load_both_columns(self, memory: Memory, *index: Reg) -> Columns:
        """Both columns of the lane, `[n-tile][column]`, whether exact or not."""
        return self._load_columns(memory, True, *index)

    def own_columns(self, both: Columns) -> Columns:
        """Columns as `load_columns` returns them, from those of `load_both_columns`."""
        return both if self.exact else [[self.w.select(self.is_odd, b, a)] for a, b in both]

    def _load_columns(self, memory: Memory, both: bool, *index: Reg) -> Columns:
        w = self.w
        start = w.address(memory, *index, self.head)
        columns = []
        for tile in range(self.n_tiles):
            column = self.column(tile)
            if not both:
                column = w.add(column, self.own)
            words = w.load(memory, w.add(start, w.multiply(column, 4)), 1 + both)
            columns.append([w.as_float(x) for x in words])
        return columns

    def store_columns(self, memory: Memory, columns: Columns, *index: Reg) -> None:
        """Stores a row `[..., heads, values]` of float32, if exact: lanes that hold the same column
        write the same."""
        w = self.w
        start = w.address(memory, *index, self.head)
        for tile, x in enumerate(columns):
            address = w.add(start, w.multiply(self.column(tile), 4))
            w.store(memory, address, [w.as_bits(x) for x in x])

    def load_d_out(self, memory: Memory, *index: Reg) -> list[Reg]:
        """`[n-tile]`: both columns of the lane of a row `[..., heads, values]` in the dtype of the
        inputs; in bfloat16 a pair."""
        if self.exact:
            return self.load_columns(memory, *index)
        w = self.w
        start = w.address(memory, *index, self.head)
        return [
            w.load(memory, w.add(start, w.multiply(self.column(tile), 2)), 1)[0]
            for tile in range(self.n_tiles)
        ]

    # States

    def to_words(self, state: State) -> Words:
        w = self.w
        if self.exact:
            return [w.as_bits(x) for tile in state for columns in tile for x in columns]
        return [w.pack_bf16(*columns) for tile in state for columns in tile]

    def from_words(self, words: Words) -> State:
        x = [self.w.as_float(x) for x in words] if self.exact else self._wide(words)
        pairs = [x[i : i + 2] for i in range(0, len(x), 2)]
        return [pairs[u * self.lane_keys : (u + 1) * self.lane_keys] for u in range(self.n_tiles)]

    def dot(self, x: State, y: State) -> Reg:
        """This lane's part of the dot product of two states."""
        a, b = ([x for tile in z for columns in tile for x in columns] for z in (x, y))
        return self._dot(a, b)

    def _dot(self, x: list[Reg], y: list[Reg]) -> Reg:
        """The dot product, in two chains of FMAs where one would be long."""
        w = self.w
        n_chains = 2 if len(x) >= 8 else 1
        chains: list[Reg] = []
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            if i < n_chains:
                chains.append(w.fmultiply(a, b))
            else:
                chains[i % n_chains] = w.fma(a, b, chains[i % n_chains])
        return chains[0] if n_chains == 1 else w.fadd(*chains)

    def sums_over_keys(self, state: State, k: list[Reg]) -> Columns:
        """S^T k."""
        w = self.w
        sums = [[self._dot([x[column] for x in tile], k) for column in range(2)] for tile in state]
        if not self.exact:
            # Each lane gives away one of its columns and goes on with the other.
            sums = [
                [w.fadd(w.select(self.is_odd, b, a), w.shuffle_xor(w.select(self.is_odd, a, b), 4))]
                for a, b in sums
            ]
        distances = (4, 8, 16) if self.exact else (8, 16)
        return [[self.sum_over_lanes(x, *distances) for x in columns] for columns in sums]

    def sum_over_lanes(self, x: Reg, *distances: int) -> Reg:
        """The sum over the lanes whose numbers differ in these bits.

        Two bits at a time take one more shuffle than one at a time, but half of the latency.
        """
        w = self.w
        while len(distances) > 1:
            (a, b), distances = distances[:2], distances[2:]
            y = w.fadd(w.shuffle_xor(x, b), w.shuffle_xor(x, a ^ b))
            x = w.fadd(w.fadd(x, w.shuffle_xor(x, a)), y)
        return w.fadd(x, w.shuffle_xor(x, distances[0])) if distances else x

    def add_outer(self, state: State, k: list[Reg], columns: Columns) -> State:
        """The state plus the outer product of keys and columns."""
        if self.exact:
            return self._add_outer_exactly(state, k, columns)
        w = self.w
        given = [w.fmultiply(x, self._given) for (x,) in columns]

        def add(u: int, i: int, j: int, acc: list[Reg]) -> list[Reg]:
            return w.mma_tf32(acc, [k[i], k[j]], given[u])

        return self._add_by_mma(state, add)

    def add_outer_of_d_out(self, state: State, words: Words, d_out: list[Reg]) -> State:
        """As `add_outer`, of keys as words and what `load_d_out` returned."""
        if self.exact:
            return self._add_outer_exactly(state, self.wide_keys(words), d_out)
        w = self.w
        # A word has two keys: one meets the column, the other a zero.
        given = [[w.permute_bytes(pair, 0, half) for half in self._halves] for pair in d_out]

        def add(u: int, i: int, j: int, acc: list[Reg]) -> list[Reg]:
            low, high = words[i // 2], words[j // 2]
            if j == i + 1:
                high = w.permute_bytes(high, high, 0x1032)
            return w.mma_bf16(acc, [low, high], given[u][i % 2])

        return self._add_by_mma(state, add)

    def _add_by_mma(
        self, state: State, add: Callable[[int, int, int, list[Reg]], list[Reg]]
    ) -> State:
        """The state after `add(n-tile, key, key, accumulator)` for each pair of the lane's keys."""
        result = []
        for u, tile in enumerate(state):
            keys: list[list[Reg]] = [[] for _ in range(self.lane_keys)]
            for i, j in self._key_pairs:
                acc = add(u, i, j, [*tile[i], *tile[j]])
                keys[i], keys[j] = acc[:2], acc[2:]
            result.append(keys)
        return result

    def _add_outer_exactly(self, state: State, k: list[Reg], columns: Columns) -> State:
        w = self.w
        return [
            [[w.fma(k_m, x, s) for s, x in zip(pair, own, strict=True)] for k_m, pair in rows]
            for own, rows in zip(columns, (zip(k, u, strict=True) for u in state), strict=True)
        ]

    # Sums over columns: the gradients of q and k

    def zero_accumulators(self) -> Accumulators:
        return [[self.w.number(0.0)] * 4 for _ in range(self.lane_keys // 2)]

    def only(self, column: int, words: Words) -> Words:
        """Words in one column of an mma, and zeros in the others."""
        w = self.w
        selector = w.select(w.equal(self.g, column), 0x3210, 0x7654)
        return [w.permute_bytes(x, 0, selector) for x in words]

    def pairs(self, column: int, columns: Columns) -> Words:
        """`[n-tile]`: both columns of the lane in bfloat16, valid in the lanes of this column."""
        w = self.w
        both = [(x, w.shuffle_xor(x, 4)) for (x,) in columns]
        # The own column of these lanes is the odd one where `column` is odd.
        return [w.pack_bf16(*(x[::-1] if column % 2 else x)) for x in both]

    def negative_pairs(self, pairs: Words) -> Words:
        return [self.w.bits_xor(x, _SIGNS) for x in pairs]

    def store_pairs(self, column: int, memory: Memory, pairs: Words, *index: Reg) -> None:
        """Stores what `pairs` returned in a row `[..., heads, values]` of bfloat16."""
        w = self.w
        start = w.address(memory, *index, self.head)

        def store() -> None:
            for tile, pair in enumerate(pairs):
                w.store(memory, w.add(start, w.multiply(self.column(tile), 2)), [pair])

        w.when(w.equal(self.g, column), store)

    def accumulate(self, sums: Accumulators, words: Words, pairs: Words) -> Accumulators:
        """Adds mmas of a state as words and pairs of columns."""
        sums = list(sums)
        for tile, b in enumerate(pairs):
            for i in range(self.lane_keys // 2):
                first = tile * self.lane_keys + 2 * i
                sums[i] = self.w.mma_bf16(sums[i], words[first : first + 2], b)
        return sums

    def accumulate_tf32(self, sums: Accumulators, state: State, words: Words) -> Accumulators:
        """As `accumulate`, of a float32 state and float32 words, two for each n-tile."""
        sums = list(sums)
        for i in range(self.lane_keys // 2):
            for j, x in enumerate(words):
                tile, column = divmod(j, 2)
                a = [state[tile][m][column] for m in (2 * i, 2 * i + 1)]
                sums[i] = self.w.mma_tf32(sums[i], a, self.w.as_float(x))
        return sums

    def accumulate_exactly(
        self, sums: Accumulators, column: int, of: list[tuple[State, Columns]]
    ) -> Accumulators:
        """Adds sums over columns of states times columns to one of the 8, without mma."""
        w, sums = self.w, [list(x) for x in sums]
        lane, slot = divmod(column, 2)
        for m in range(self.lane_keys):
            pairs = [
                (x[tile][m][i], columns[tile][i])
                for x, columns in of
                for tile in range(self.n_tiles)
                for i in range(2)
            ]
            total = self._dot(*map(list, zip(*pairs, strict=True)))
            total = self.sum_over_lanes(total, 1, 2)
            total = w.select(w.equal(self.c, lane), total, w.number(0.0))
            acc, i = sums[m // 2], 2 * (m % 2) + slot
            acc[i] = w.fadd(acc[i], total)
        return sums

    def lane_part_of_dot(self, columns: Columns, others: Columns) -> Reg:
        """A number that adds up over lanes to the dot product of columns."""
        w = self.w
        x, y = ([x for tile in z for x in tile] for z in (columns, others))
        held_by = 8 if self.exact else 4  # lanes that hold the same column
        return w.fmultiply(self._dot(x, y), w.number(1 / held_by))
