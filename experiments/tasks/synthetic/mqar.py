"""Multi-query associative recall (zoology, arXiv:2312.04927)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

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

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_setting, *keys = jax.random.split(key, 1 + len(self.lengths))
        shares = jnp.log(jnp.asarray(self.shares, jnp.float32))
        setting = jax.random.categorical(of_setting, shares, shape=(rows,))
        settings = zip(keys, self.lengths, self.pairs, strict=True)
        drawn = [self._of_setting(key, rows, size, n, length) for key, size, n in settings]
        row = jnp.arange(rows)
        return Sequences(*(jnp.stack(arrays)[setting, row] for arrays in zip(*drawn, strict=True)))

    def _of_setting(
        self, key: Array, rows: int, size: int, pairs: int, length: int
    ) -> tuple[Array, Array, Array]:
        """Sequences of one setting, filled to `length`."""
        of_keys, of_values, of_gaps, of_filler = jax.random.split(key, 4)
        half = self.n_tokens // 2
        keys = _distinct(of_keys, rows, half, pairs)
        values = half + _distinct(of_values, rows, self.n_tokens - half, pairs)
        # Queries stand at every second token after the pairs.
        slots = (size - 2 * pairs) // 2
        distance = jnp.arange(1, slots + 1, dtype=jnp.float32)
        weight = (self.power - 1) * jnp.log(distance)
        noise = jax.random.gumbel(of_gaps, (rows, slots))
        _, gaps = jax.lax.top_k(weight[None] + noise, pairs)  # without replacement
        at = 2 * pairs + 2 * gaps
        row = jnp.arange(rows)[:, None]
        inputs = jax.random.randint(of_filler, (rows, length), 0, self.n_tokens, jnp.int32)
        written = jnp.stack([keys, values], axis=2).reshape(rows, -1)
        inputs = inputs.at[:, : 2 * pairs].set(written).at[row, at].set(keys)
        targets = jnp.zeros_like(inputs).at[row, at].set(values)
        weights = jnp.zeros((rows, length), jnp.float32).at[row, at].set(1.0)
        return inputs, targets, weights


def _distinct(key: Array, rows: int, below: int, n: int) -> Array:
    """`n` distinct integers from 0 to `below` - 1, `[rows, n]` int32, in random order."""
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (rows, below)), n)
    return chosen.astype(jnp.int32)
