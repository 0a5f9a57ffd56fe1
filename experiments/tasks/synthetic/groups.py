"""Word problems of permutation groups (arXiv:2502.10297): the product of the elements so far."""

import dataclasses
import functools
import itertools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .base import Tracking

Permutation = tuple[int, ...]
"""Image of each point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Tracking):
    """Random elements of a permutation group: their product so far, the first one applied first."""

    NAME: ClassVar[str] = "group"

    group: Literal["S3", "S4", "A5", "S5"] = "S3"
    """Symmetric or alternating group of so many points. Elements have ids by their lexicographic
    order."""
    tokens: Literal["elements", "swaps"] = "elements"
    """Tokens: all elements, or swaps of two neighbouring points, which generate a symmetric group;
    token i then swaps points i and i + 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens == "swaps" and self.group.startswith("A"):
            raise ValueError(f"--tokens swaps are not elements of --group {self.group}.")

    @property
    def vocab_size(self) -> int:
        return len(elements(self.group))

    def walk(self, key: Array, rows: int, length: int) -> tuple[Array, Array]:
        choices = swaps(self.group) if self.tokens == "swaps" else np.arange(self.vocab_size)
        drawn = jax.random.randint(key, (rows, length), 0, len(choices), jnp.int32)
        table = jnp.asarray(products(self.group), jnp.int32)
        then = lambda a, b: table[a, b]  # noqa: E731
        return drawn, lax.associative_scan(then, jnp.asarray(choices, jnp.int32)[drawn], axis=1)


@functools.cache
def elements(group: str) -> list[Permutation]:
    """The permutations of a group, such as "S3" or "A5", in lexicographic order."""
    every = itertools.permutations(range(int(group[1:])))
    return [p for p in every if group[0] == "S" or _is_even(p)]


def _is_even(permutation: Permutation) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


@functools.cache
def products(group: str) -> np.ndarray:
    """`[n, n]`: the id of "a, then b"."""
    ids = {p: i for i, p in enumerate(elements(group))}
    then = lambda a, b: ids[tuple(b[x] for x in a)]  # noqa: E731
    return np.array([[then(a, b) for b in elements(group)] for a in elements(group)])


@functools.cache
def swaps(group: str) -> np.ndarray:
    """The ids of the swaps of neighbouring points, by the lower point."""
    n = int(group[1:])
    ids = {p: i for i, p in enumerate(elements(group))}
    points = range(n)
    return np.array([ids[*points[:i], i + 1, i, *points[i + 2 :]] for i in range(n - 1)])
