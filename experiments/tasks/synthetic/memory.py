"""Tasks of memory: selective copying and recall by key, once or many times."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from experiments.cli import require

from .base import Sequences, SyntheticConfig


def _places(key: Array, rows: int, slots: int, n: int) -> Array:
    """`n` of `slots` places, distinct and ascending, `[rows, n]` int32."""
    order = jnp.argsort(jax.random.uniform(key, (rows, slots)), axis=1)
    return jnp.sort(order[:, :n], axis=1).astype(jnp.int32)


def _interleave(*streams: Array) -> Array:
    """`[rows, len(streams) * n]`: the first of each stream `[rows, n]`, then the second, ..."""
    return jnp.stack(streams, axis=-1).reshape(streams[0].shape[0], -1)


def _ask_last(pairs: Array, query: Array, answer: Array, length: int, blank: int) -> Sequences:
    """Sequences `[rows, length]` of pairs, blanks if need be, and a query whose answer is asked."""
    rows = pairs.shape[0]
    inputs = jnp.full((rows, length), blank, jnp.int32).at[:, : pairs.shape[1]].set(pairs)
    inputs = inputs.at[:, -1].set(query)
    targets = jnp.zeros_like(inputs).at[:, -1].set(answer)
    weights = jnp.zeros((rows, length), jnp.float32).at[:, -1].set(1.0)
    return Sequences(inputs, targets, weights)


def _slots(length: int) -> int:
    """Pairs of tokens that fit before a query."""
    return (length - 1) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(SyntheticConfig):
    """Tokens at random places among blanks, then GO, then as many blanks: at these, the tokens in
    their order. Tokens are 0, ..., then come blank and GO."""

    NAME: ClassVar[str] = "copy"

    alphabet: int = 16
    """Different tokens."""
    copied: int = 8
    """Tokens of a sequence."""

    def __post_init__(self) -> None:
        require(self, "alphabet", "copied", minimum=1)

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 2

    def check_length(self, length: int) -> None:
        if length < 2 * self.copied + 1:
            raise ValueError(
                f"{length} is too short for --copied {self.copied} tokens, GO and their copies, "
                f"{2 * self.copied + 1}."
            )

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_places, of_tokens = jax.random.split(key)
        n, blank = self.copied, self.alphabet
        places = _places(of_places, rows, length - n - 1, n)
        tokens = jax.random.randint(of_tokens, (rows, n), 0, self.alphabet, jnp.int32)
        inputs = jnp.full((rows, length), blank, jnp.int32)
        inputs = inputs.at[jnp.arange(rows)[:, None], places].set(tokens)
        inputs = inputs.at[:, length - n - 1].set(blank + 1)
        targets = jnp.zeros_like(inputs).at[:, -n:].set(tokens)
        weights = jnp.zeros((rows, length), jnp.float32).at[:, -n:].set(1.0)
        return Sequences(inputs, targets, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(SyntheticConfig):
    """Pairs of a key and a value at random places among blanks, then one of the keys: its value.
    Keys are 0, ..., then come values and blank."""

    NAME: ClassVar[str] = "recall"

    keys: int = 16
    """Different keys."""
    values: int = 16
    """Different values."""
    pairs: int = 8
    """Pairs of a sequence, whose keys are distinct."""

    def __post_init__(self) -> None:
        require(self, "keys", "values", "pairs", minimum=1)
        if self.pairs > self.keys:
            raise ValueError(
                f"--pairs {self.pairs} of distinct keys need as many --keys, got {self.keys}."
            )

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + 1

    def check_length(self, length: int) -> None:
        if _slots(length) < self.pairs:
            raise ValueError(
                f"{length} is too short for --pairs {self.pairs} and a query, {2 * self.pairs + 1}."
            )

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_places, of_keys, of_values, of_query = jax.random.split(key, 4)
        n, slots, blank = self.pairs, _slots(length), self.keys + self.values
        places = _places(of_places, rows, slots, n)
        keys = jax.random.permutation(
            of_keys,
            jnp.tile(jnp.arange(self.keys, dtype=jnp.int32), (rows, 1)),
            1,
            independent=True,
        )[:, :n]
        values = jax.random.randint(of_values, (rows, n), 0, self.values, jnp.int32)
        values += self.keys
        row = jnp.arange(rows)
        stream = jnp.full((rows, slots), blank, jnp.int32)
        pairs = _interleave(
            stream.at[row[:, None], places].set(keys), stream.at[row[:, None], places].set(values)
        )
        asked = jax.random.randint(of_query, (rows,), 0, n)
        return _ask_last(pairs, keys[row, asked], values[row, asked], length, blank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overwrite(SyntheticConfig):
    """Keys written again and again, then one of them: its newest value. Keys are 0, ..., then come
    values and "cleared", which is a value too. At an even length one "cleared" precedes the query.
    """

    NAME: ClassVar[str] = "overwrite"

    keys: int = 16
    """Different keys."""
    values: int = 16
    """Different values."""
    clear_probability: float = 0.0
    """Probability that a write clears its key."""

    def __post_init__(self) -> None:
        require(self, "keys", "values", minimum=1)
        require(self, "clear_probability", minimum=0, below=1)

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + 1

    def check_length(self, length: int) -> None:
        if length < 3:
            raise ValueError(f"{length} is too short for a write and a query, 3.")

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_keys, of_values, of_clears, of_query = jax.random.split(key, 4)
        slots, cleared = _slots(length), self.keys + self.values
        shape = rows, slots
        keys = jax.random.randint(of_keys, shape, 0, self.keys, jnp.int32)
        values = jax.random.randint(of_values, shape, self.keys, cleared, jnp.int32)
        clears = jax.random.bernoulli(of_clears, self.clear_probability, shape)
        values = jnp.where(clears, cleared, values)
        row = jnp.arange(rows)
        query = keys[row, jax.random.randint(of_query, (rows,), 0, slots)]
        newest = jnp.max(jnp.where(keys == query[:, None], jnp.arange(slots)[None], -1), axis=1)
        pairs = _interleave(keys, values)
        return _ask_last(pairs, query, values[row, newest], length, cleared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedRing(SyntheticConfig):
    """Moves (left, stay, right) of rings, each by a key, at random places among blanks, then a key:
    the state of its ring, from state 0. Keys are 0, ..., then come moves and blank."""

    NAME: ClassVar[str] = "keyed_fsm"
    MOVES: ClassVar[int] = 3

    keys: int = 8
    """Rings."""
    states: int = 8
    """States of each."""
    density: float = 0.75
    """Share of the pairs of tokens that are moves, not blanks: 48 of the 63 of 128 tokens."""

    def __post_init__(self) -> None:
        require(self, "keys", minimum=1)
        require(self, "states", minimum=2)
        require(self, "density", above=0)
        if self.density > 1:
            raise ValueError(f"--density must be at most 1, got {self.density}.")

    @property
    def vocab_size(self) -> int:
        return max(self.keys + self.MOVES + 1, self.states)

    def check_length(self, length: int) -> None:
        if length < 3:
            raise ValueError(f"{length} is too short for a move and a query, 3.")

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_places, of_keys, of_moves, of_query = jax.random.split(key, 4)
        slots, blank = _slots(length), self.keys + self.MOVES
        n = math.ceil(self.density * slots)
        places = _places(of_places, rows, slots, n)
        row = jnp.arange(rows)[:, None]
        moved = jnp.zeros((rows, slots), bool).at[row, places].set(True)
        keys = jax.random.randint(of_keys, moved.shape, 0, self.keys, jnp.int32)
        moves = jax.random.randint(of_moves, moved.shape, 0, self.MOVES, jnp.int32)
        query = jax.random.randint(of_query, (rows,), 0, self.keys, jnp.int32)
        mine = moved & (keys == query[:, None])
        state = jnp.sum(jnp.where(mine, moves - 1, 0), axis=1) % self.states
        pairs = _interleave(
            jnp.where(moved, keys, blank), jnp.where(moved, self.keys + moves, blank)
        )
        return _ask_last(pairs, query, state, length, blank)
