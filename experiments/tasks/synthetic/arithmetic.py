"""Modular arithmetic: expressions whose value is asked at the end (arXiv:2207.02098)."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.cli import require

from .base import Sequences, SyntheticConfig, draw_lengths

OPERATORS = 3
"""Plus, minus, times."""
MODULUS_LIMIT = 46342
"""Values below the modulus are multiplied in int32: 46340^2 < 2^31."""
# Items that the stack of an expression being written holds, besides lengths of expressions.
_NOTHING, _OPERATOR, _CLOSE_BINARY, _CLOSE, _NEGATED_DIGIT = 0, -1, -2, -3, -4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(SyntheticConfig):
    """Sums, differences and products of digits, then "=": there, the value modulo the number of
    digits, by the usual precedence. Digits are 0, ..., then come + - * = ( ) and blank."""

    NAME: ClassVar[str] = "arithmetic"

    modulus: int = 5
    """Digits, and values of the answer."""
    brackets: bool = False
    """Bracket every operation, as in ((1+-4)*(2)); digits may have a minus or brackets."""
    min_length: int | None = None
    """Lengths of expressions with "=" are drawn uniformly from this to --seq-len; None for
    --seq-len alone. Blanks follow. Without brackets an odd length becomes the even one below."""

    def __post_init__(self) -> None:
        require(self, "modulus", minimum=2, below=MODULUS_LIMIT)
        require(self, "min_length", minimum=2)

    @property
    def vocab_size(self) -> int:
        return self.modulus + OPERATORS + 4

    def check_length(self, length: int) -> None:
        if length < 2:
            raise ValueError(f'{length} is too short for an expression and "=", 2.')
        if self.min_length is not None and length < self.min_length:
            raise ValueError(f"{length} is shorter than --min-length {self.min_length}.")

    def sample(self, key: Array, rows: int, length: int) -> Sequences:
        of_lengths, of_expressions = jax.random.split(key)
        sizes = draw_lengths(of_lengths, rows, self.min_length, length) - 1
        if not self.brackets:
            sizes = sizes - (1 - sizes % 2)  # a digit, and operators with a digit each
            tokens, value = self._flat(of_expressions, sizes, length)
        else:
            keys = jax.random.split(of_expressions, rows)
            tokens, value = jax.vmap(self._nested, (0, 0, None))(keys, sizes, length)
        position = jnp.arange(length)[None]
        ends = position == sizes[:, None]
        equals = self.modulus + OPERATORS
        tokens = jnp.where(position < sizes[:, None], tokens, jnp.where(ends, equals, equals + 3))
        return Sequences(tokens, jnp.where(ends, value[:, None], 0), ends.astype(jnp.float32))

    def _flat(self, key: Array, sizes: Array, length: int) -> tuple[Array, Array]:
        """Tokens `[rows, T]` without brackets, and values `[rows]`, of expressions of odd `sizes`
        `[rows]` tokens; tokens after them mean nothing."""
        of_digits, of_operators = jax.random.split(key)
        rows, n = len(sizes), (length + 1) // 2
        digits = jax.random.randint(of_digits, (rows, n), 0, self.modulus, jnp.int32)
        # The operator before each digit; the first has none, which is a plus.
        operators = jax.random.randint(of_operators, (rows, n), 0, OPERATORS, jnp.int32)
        operators = operators.at[:, 0].set(0)
        written = jnp.roll(self.modulus + operators, -1, axis=1)
        tokens = jnp.stack([digits, written], axis=2).reshape(rows, -1)[:, :length]

        starts = operators < 2
        signed = jnp.where(operators == 1, -digits, digits) % self.modulus

        def then(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
            (x, x_starts), (y, y_starts) = a, b
            return jnp.where(y_starts, y, x * y % self.modulus), x_starts | y_starts

        products, _ = lax.associative_scan(then, (signed, starts), axis=1)
        index, last = jnp.arange(n)[None], (sizes[:, None] - 1) // 2
        ends = (jnp.roll(starts, -1, axis=1) | (index == last)) & (index <= last)
        return tokens, jnp.sum(jnp.where(ends, products, 0), axis=1) % self.modulus

    def _nested(self, key: Array, size: Array, length: int) -> tuple[Array, Array]:
        """Tokens `[T]` of one expression of `size` tokens, and its value.

        An expression of n tokens is a digit, a minus and a digit, either of them in brackets, or
        two expressions about an operator in brackets; their lengths are drawn uniformly.
        """
        pending = _Stack.of(length + 4).push(size)
        start = _Writer(pending, _Stack.of(length), _Stack.of(length))

        def write(writer: _Writer, key: Array) -> tuple[_Writer, Array]:
            return self._write(writer, key)

        writer, tokens = lax.scan(write, start, jax.random.split(key, length))
        return tokens, writer.values.top()

    def _write(self, writer: "_Writer", key: Array) -> "tuple[_Writer, Array]":
        """One token, the next of what is pending."""
        of_digit, of_operator, of_split = jax.random.split(key, 3)
        item, pending = writer.pending.pop()
        digit = jax.random.randint(of_digit, (), 0, self.modulus, jnp.int32)
        operator = jax.random.randint(of_operator, (), 0, OPERATORS, jnp.int32)
        inner = jnp.maximum(item - 3, 2)
        left = jax.random.randint(of_split, (), 1, inner, jnp.int32)
        plus, minus, opening = self.modulus, self.modulus + 1, self.modulus + OPERATORS + 1
        right_value, rest = writer.values.pop()
        left_value, rest = rest.pop()
        applied, operators = writer.operators.pop()
        result = jnp.stack(
            [left_value + right_value, left_value - right_value, left_value * right_value]
        )[applied]

        def same(token: int | Array, **parts: "_Stack") -> tuple[_Writer, Array]:
            after = writer._replace(pending=pending)._replace(**parts)
            return after, jnp.asarray(token, jnp.int32)

        binary = pending.push(jnp.int32(_CLOSE_BINARY)).push(item - 3 - left)
        cases = [
            (item == _NOTHING, same(0, pending=writer.pending)),
            (item == _OPERATOR, same(plus + operator, operators=writer.operators.push(operator))),
            (
                item == _CLOSE_BINARY,
                same(opening + 1, values=rest.push(result % self.modulus), operators=operators),
            ),
            (item == _CLOSE, same(opening + 1)),
            (
                item == _NEGATED_DIGIT,
                same(digit, values=writer.values.push(-digit % self.modulus)),
            ),
            (item == 1, same(digit, values=writer.values.push(digit))),
            (item == 2, same(minus, pending=pending.push(jnp.int32(_NEGATED_DIGIT)))),
            (
                (item == 3) | (item == 4),
                same(opening, pending=pending.push(jnp.int32(_CLOSE)).push(item - 2)),
            ),
            (
                item > 4,
                same(opening, pending=binary.push(jnp.int32(_OPERATOR)).push(left)),
            ),
        ]
        chosen = cases[0][1]
        for holds, case in cases[1:]:
            chosen = jax.tree.map(lambda x, y, holds=holds: jnp.where(holds, x, y), case, chosen)
        return chosen


class _Stack(NamedTuple):
    """A stack of int32; popping an empty one gives 0 and leaves it."""

    items: Array
    size: Array

    @classmethod
    def of(cls, capacity: int) -> "_Stack":
        return cls(jnp.zeros(capacity, jnp.int32), jnp.int32(0))

    def push(self, item: Array) -> "_Stack":
        return _Stack(self.items.at[self.size].set(item), self.size + 1)

    def top(self) -> Array:
        return jnp.where(self.size > 0, self.items[self.size - 1], 0)

    def pop(self) -> "tuple[Array, _Stack]":
        return self.top(), self._replace(size=jnp.maximum(self.size - 1, 0))


class _Writer(NamedTuple):
    """An expression while it is written and evaluated."""

    pending: _Stack
    """Parts that are still to be written: lengths of expressions, and items below 0."""
    values: _Stack
    operators: _Stack
