"""Tasks of state tracking: parity, counters, a ring of states, brackets."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.cli import INT32_LIMIT, require

from .base import Tracking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Tracking):
    """Parity of random bits: their sum so far, mod 2."""

    NAME: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        return 2

    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        bits = jax.random.randint(key, (rows, length), 0, 2, jnp.int32)
        return bits, jnp.cumsum(bits, axis=1) % 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counter(Tracking):
    """Random integers below the modulus: their sum so far, mod the modulus."""

    NAME: ClassVar[str] = "counter"

    modulus: int = 5
    """Values of the counter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "modulus", minimum=2)

    @property
    def vocab_size(self) -> int:
        return self.modulus

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if (self.modulus - 1) * length >= INT32_LIMIT:
            raise ValueError(
                f"{length} times --modulus {self.modulus} must be below 2**31, as sums are int32."
            )

    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        steps = jax.random.randint(key, (rows, length), 0, self.modulus, jnp.int32)
        return steps, jnp.cumsum(steps, axis=1) % self.modulus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Tracking):
    """Random moves (left, stay, right) on a ring of states: the state so far, from state 0."""

    NAME: ClassVar[str] = "fsm"
    MOVES: ClassVar[int] = 3
    """Token m moves by m - 1."""

    states: int = 4
    """States of the ring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "states", minimum=2)

    @property
    def vocab_size(self) -> int:
        return max(self.MOVES, self.states)

    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        moves = jax.random.randint(key, (rows, length), 0, self.MOVES, jnp.int32)
        return moves, jnp.cumsum(moves - 1, axis=1) % self.states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dyck(Tracking):
    """Random well-nested brackets: their depth so far, or the kind of bracket that must close.

    Brackets open and close with equal probability; at depth 0 one opens, at the greatest depth one
    closes.
    """

    NAME: ClassVar[str] = "dyck"

    kinds: int = 1
    """Kinds of brackets. Kind j opens by token j and closes by token kinds + j. With one the answer
    is the depth; with more it is the kind that must close next, or `kinds` at depth 0."""
    max_depth: int = 8
    """Greatest depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "kinds", "max_depth", minimum=1)

    @property
    def vocab_size(self) -> int:
        return max(2, self.max_depth + 1) if self.kinds == 1 else 2 * self.kinds

    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        of_depth, of_kinds = jax.random.split(key)
        depth = self._depths(of_depth, rows, length)
        before = jnp.pad(depth[:, :-1], ((0, 0), (1, 0)))
        opens = depth > before
        if self.kinds == 1:
            return (~opens).astype(jnp.int32), depth
        drawn = jax.random.randint(of_kinds, depth.shape, 0, self.kinds, jnp.int32)
        top = self._top(drawn, opens, depth)
        closes = jnp.pad(top[:, :-1], ((0, 0), (1, 0)))  # the kind on top before it
        return jnp.where(opens, drawn, self.kinds + closes), top

    def _depths(self, key: Array, rows: int, length: int) -> Array:
        """The random walk, `[rows, T]`: a prefix product of the steps as maps of depths."""
        depths = np.arange(self.max_depth + 1)
        up = np.where(depths < self.max_depth, depths + 1, depths - 1)
        down = np.where(depths > 0, depths - 1, depths + 1)
        coins = jax.random.randint(key, (rows, length), 0, 2, jnp.int32)
        steps = jnp.asarray(np.stack([down, up]), jnp.int32)[coins]  # [rows, T, depths]
        then = lambda f, g: jnp.take_along_axis(g, f, axis=-1)  # noqa: E731
        return lax.associative_scan(then, steps, axis=1)[..., 0]

    def _top(self, drawn: Array, opens: Array, depth: Array) -> Array:
        """The kind that is open at each position, `[rows, T]`: that of the last bracket that opened
        to this depth."""
        rows, length = depth.shape
        levels = jnp.arange(1, self.max_depth + 1)[:, None, None]
        time = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
        opened = jnp.where(opens[None] & (depth[None] == levels), time[None], -1)
        last = lax.cummax(opened, axis=2)  # [levels, rows, T]
        level = jnp.maximum(depth - 1, 0)[None]
        last = jnp.maximum(jnp.take_along_axis(last, level, axis=0)[0], 0)
        kind = jnp.take_along_axis(drawn, last, axis=1)
        return jnp.where(depth > 0, kind, self.kinds)
