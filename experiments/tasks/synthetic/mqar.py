"""Multi-query associative recall (zoology, arXiv:2312.04927)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.cli import require

from .base import Sequences, SyntheticConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiQuery(SyntheticConfig):
    """Pairs of a key and a value, then every key once among random tokens: its value there.

    Rows differ in length and pairs: settings are `lengths[i]` tokens with `pairs[i]` pairs, drawn
    in proportion to `shares`; random tokens fill a row. Keys are tokens of the lower half of the
    vocabulary, values of the upper. A key's distance from the pairs has a power law.
    """

    NAME: ClassVar[str] = "mqar"

    n_tokens: int = 8192
    """Vocabulary."""
    lengths: tuple[int, ...] = (64, 128, 256, 256, 256)
    """Length of each setting."""
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Pairs of each setting."""
    shares: tuple[float, ...] = (5.0, 1.0, 1.0, 1.0, 1.0)
    """Examples of each setting, in proportion."""
    power: float = 0.01
    """Exponent a of the density of distances d, which is proportional to d^(a - 1)."""

    def __post_init__(self) -> None:
        require(self, "n_tokens", minimum=4)
        require(self, "lengths", "pairs", minimum=1)
        require(self, "shares", "power", above=0)
        if not len(self.lengths) == len(self.pairs) == len(self.shares) > 0:
            raise ValueError(
                f"--lengths, --pairs and --shares need as many values each, got "
                f"{len(self.lengths)}, {len(self.pairs)} and {len(self.shares)}."
            )
        for length, pairs in zip(self.lengths, self.pairs, strict=True):
            if length < 4 * pairs:
                raise ValueError(f"--pairs {pairs} need --lengths of {4 * pairs}, got {length}.")
        if max(self.pairs) > self.n_tokens // 2:
            raise ValueError(
                f"--pairs {max(self.pairs)} need as many keys, half of --n-tokens {self.n_tokens}."
            )

    @property
    def vocab_size(self) -> int:
        return self.n_tokens

    def check_length(self, length: int) -> None:
        if length < max(self.lengths):
            raise ValueError(f"{length} is shorter than --lengths {max(self.lengths)}.")

    def most_answers(self, length: int) -> int:
        return max(self.pairs)

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_setting, of_keys, of_values, of_gaps, of_filler = jax.random.split(key, 5)
        shares = jnp.log(jnp.asarray(self.shares, jnp.float32))
        setting = jax.random.categorical(of_setting, shares, shape=(rows,))
        size, pairs = (
            jnp.asarray(x, jnp.int32)[setting][:, None] for x in (self.lengths, self.pairs)
        )
        # For the largest setting; a smaller one has the first of them.
        half, most = self.n_tokens // 2, max(self.pairs)
        keys = _distinct(of_keys, rows, half, most)
        values = half + _distinct(of_values, rows, self.n_tokens - half, most)
        # Queries stand at every second token after the pairs.
        slots = (size - 2 * pairs) // 2
        most_slots = max((n - 2 * m) // 2 for n, m in zip(self.lengths, self.pairs, strict=True))
        slot = jnp.arange(most_slots, dtype=jnp.int32)[None]
        weight = (self.power - 1) * jnp.log(slot.astype(jnp.float32) + 1)
        noise = jax.random.gumbel(of_gaps, (rows, most_slots))
        drawn = jnp.where(slot < slots, weight + noise, -jnp.inf)
        _, gaps = lax.top_k(drawn, most)  # without replacement
        pair, row = jnp.arange(most, dtype=jnp.int32)[None], jnp.arange(rows)[:, None]

        def placed(array: Array, at: Array, what: Array | float) -> Array:
            at = jnp.where(pair < pairs, at, length)  # out of the array: of a larger setting
            return array.at[row, at].set(what, mode="drop")

        asked = 2 * pairs + 2 * gaps
        inputs = jax.random.randint(of_filler, (rows, length), 0, self.n_tokens, jnp.int32)
        for at, what in ((2 * pair, keys), (2 * pair + 1, values), (asked, keys)):
            inputs = placed(inputs, at, what)
        targets = placed(jnp.zeros_like(inputs), asked, values)
        weights = placed(jnp.zeros((rows, length), jnp.float32), asked, 1.0)
        return Sequences(inputs, targets, weights)


def _distinct(key: Array, rows: int, below: int, n: int) -> Array:
    """`n` distinct integers from 0 to `below` - 1, `[rows, n]` int32, in random order."""
    _, chosen = lax.top_k(jax.random.uniform(key, (rows, below)), n)
    return chosen.astype(jnp.int32)
