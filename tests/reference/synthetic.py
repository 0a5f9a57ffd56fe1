"""Answers to synthetic sequences by plain programs: a stack, permutations, dictionaries, `eval`.

A program reads the tokens of one sequence. It is written from the task's description, and asserts
that the sequence is as described.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.tasks.synthetic import (
    Arithmetic,
    Copy,
    Counter,
    Dyck,
    Group,
    KeyedRing,
    MultiQuery,
    Overwrite,
    Parity,
    Recall,
    Ring,
    SyntheticConfig,
)
from experiments.tasks.synthetic.base import sampler

Answers = dict[int, int]
"""Answers by position."""


class Drawn(NamedTuple):
    """`Sequences` as NumPy arrays."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@functools.cache
def draw(task: SyntheticConfig, rows: int, length: int) -> Drawn:
    """Sequences of one key."""
    return Drawn(*(np.asarray(x) for x in sampler(task, rows, length)(jax.random.key(5))))


def answers(task: SyntheticConfig, tokens: Sequence[int], asked: Sequence[int]) -> Answers:
    """The answers of one sequence.

    Args:
        task: its settings.
        tokens: the inputs.
        asked: positions with a weight. Programs of tracking and of multi-query recall answer
            there; the others find the positions themselves.
    """
    match task:
        case Parity():
            states = [sum(tokens[: t + 1]) % 2 for t in range(len(tokens))]
        case Counter(modulus=modulus):
            states = [sum(tokens[: t + 1]) % modulus for t in range(len(tokens))]
        case Ring(states=n):
            states = ring(tokens, n)
        case Dyck(kinds=kinds, max_depth=max_depth):
            states = dyck(tokens, kinds, max_depth)
        case Group(group=group, tokens=kind):
            states = permuted(tokens, group, swaps=kind == "swaps")
        case MultiQuery(n_tokens=n_tokens):
            return mqar(tokens, n_tokens, asked)
        case Copy(alphabet=alphabet, copied=copied):
            return copy(tokens, alphabet, copied)
        case Recall(keys=keys, values=values, pairs=pairs):
            return recall(tokens, keys, values, pairs)
        case Overwrite(keys=keys, values=values):
            return overwrite(tokens, keys, values)
        case KeyedRing(keys=keys, states=n, density=density):
            return keyed_ring(tokens, keys, n, density)
        case Arithmetic(modulus=modulus, brackets=brackets):
            return arithmetic(tokens, modulus, brackets=brackets)
        case _:
            raise NotImplementedError(task.NAME)
    return {t: states[t] for t in asked}


def ring(moves: Sequence[int], n: int) -> list[int]:
    """States of a ring of `n`, which tokens 0, 1, 2 move left, nowhere and right."""
    state, states = 0, []
    for move in moves:
        assert move in (0, 1, 2), f"{move} is no move"
        if move == 0:
            state = state - 1 if state > 0 else n - 1
        elif move == 2:
            state = state + 1 if state < n - 1 else 0
        states.append(state)
    return states


def dyck(tokens: Sequence[int], kinds: int, max_depth: int) -> list[int]:
    """Depths for one kind of brackets; for more, the kind on top of the stack, `kinds` if none."""
    stack: list[int] = []
    states = []
    for token in tokens:
        if token < kinds:
            stack.append(token)
        else:
            assert token < 2 * kinds, f"{token} is no bracket"
            assert stack[-1:] == [token - kinds], "a bracket closes another"
            stack.pop()
        assert len(stack) <= max_depth, "too deep"
        states.append(len(stack) if kinds == 1 else stack[-1] if stack else kinds)
    return states


@functools.cache
def permutations(group: str) -> list[tuple[int, ...]]:
    """Elements in lexicographic order, each by the images of the points."""
    n = int(group[1:])
    every = sorted(itertools.permutations(range(n)))
    return every if group[0] == "S" else [p for p in every if (n - _cycles(p)) % 2 == 0]


def _cycles(permutation: Sequence[int]) -> int:
    left, cycles = set(range(len(permutation))), 0
    while left:
        point = left.pop()
        cycles += 1
        while (point := permutation[point]) in left:
            left.remove(point)
    return cycles


def permuted(tokens: Sequence[int], group: str, *, swaps: bool) -> list[int]:
    """Elements of a group that tokens lead to, each applied to where the points are by then."""
    elements = permutations(group)
    places, states = list(range(int(group[1:]))), []
    for token in tokens:
        if swaps:
            assert token < len(places) - 1, f"{token} is no swap"
            exchanged = {token: token + 1, token + 1: token}
            places = [exchanged.get(place, place) for place in places]
        else:
            places = [elements[token][place] for place in places]
        states.append(elements.index(tuple(places)))
    return states


def copy(tokens: Sequence[int], alphabet: int, copied: int) -> Answers:
    blank, go = alphabet, alphabet + 1
    assert list(tokens).count(go) == 1, "GO is not there once"
    at = list(tokens).index(go)
    shown = [token for token in tokens[:at] if token != blank]
    assert len(shown) == copied, f"{len(shown)} tokens"
    assert list(tokens[at + 1 :]) == [blank] * copied, "after GO, no blanks for the copies"
    return {at + 1 + i: token for i, token in enumerate(shown)}


def _pairs(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs before the query; one token is left over where the length is even."""
    body = tokens[:-1]
    return list(zip(body[::2], body[1::2], strict=False))


def _check_pair(pair: tuple[int, int], keys: int, values: int) -> None:
    key, value = pair
    assert key < keys <= value < keys + values, f"{key}, {value} is no pair"


def recall(tokens: Sequence[int], keys: int, values: int, n_pairs: int) -> Answers:
    blank, table = keys + values, {}
    for pair in _pairs(tokens):
        if pair != (blank, blank):
            _check_pair(pair, keys, values)
            assert pair[0] not in table, "a key comes twice"
            table[pair[0]] = pair[1]
    assert len(table) == n_pairs, f"{len(table)} pairs"
    assert len(tokens) % 2 == 1 or tokens[-2] == blank, "the token left over is not blank"
    assert tokens[-1] in table, "the query is no key"
    return {len(tokens) - 1: table[tokens[-1]]}


def overwrite(tokens: Sequence[int], keys: int, values: int) -> Answers:
    table = {}
    for pair in _pairs(tokens):
        _check_pair(pair, keys, values + 1)
        table[pair[0]] = pair[1]
    assert len(tokens) % 2 == 1 or tokens[-2] == keys + values, "the token left over is a key"
    assert tokens[-1] in table, "the query is no key"
    return {len(tokens) - 1: table[tokens[-1]]}


def keyed_ring(tokens: Sequence[int], keys: int, n: int, density: float) -> Answers:
    blank, moves, pairs = keys + 3, {}, _pairs(tokens)
    for pair in pairs:
        if pair != (blank, blank):
            _check_pair(pair, keys, 3)
            moves.setdefault(pair[0], []).append(pair[1] - keys)
    n_moves = sum(map(len, moves.values()))
    assert n_moves == math.ceil(density * len(pairs)), f"{n_moves} moves"
    assert len(tokens) % 2 == 1 or tokens[-2] == blank, "the token left over is not blank"
    assert tokens[-1] < keys, "the query is no key"
    return {len(tokens) - 1: [0, *ring(moves.get(tokens[-1], []), n)][-1]}


def mqar(tokens: Sequence[int], n_tokens: int, asked: Sequence[int]) -> Answers:
    n, half = len(asked), n_tokens // 2
    pairs = list(zip(tokens[: 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
    for pair in pairs:
        _check_pair(pair, half, n_tokens - half)
    table = dict(pairs)
    assert len(table) == len({*table.values()}) == n, "keys or values repeat"
    assert min(asked) >= 2 * n, "a query before the pairs' end"
    assert {tokens[at] for at in asked} == {*table}, "a key is not asked once"
    return {at: table[tokens[at]] for at in asked}


def arithmetic(tokens: Sequence[int], modulus: int, *, brackets: bool) -> Answers:
    words = [str(token) if token < modulus else "+-*=() "[token - modulus] for token in tokens]
    end = words.index("=")
    assert {*words[end + 1 :]} <= {" "}, 'after "=", no blanks'
    written = words[:end]
    if brackets:
        assert bracketed_end(words, 0) == end, "a bracket too many"
    else:
        assert all(word.isdigit() for word in written[::2]), "no digit"
        assert {*written[1::2]} <= {"+", "-", "*"}, "no operator"
        assert end % 2 == 1, "an operator at the end"
    return {end: eval("".join(written)) % modulus}


def bracketed_end(words: Sequence[str], start: int) -> int:
    """Position after the expression that begins at `start`; every operation is in brackets."""
    if words[start] != "(":
        digit = start + (words[start] == "-")
        assert words[digit].isdigit(), "no digit"
        return digit + 1
    end = bracketed_end(words, start + 1)
    if words[end] in ("+", "-", "*"):
        end = bracketed_end(words, end + 1)
    else:
        assert words[start + 1] != "(", "brackets about brackets"
    assert words[end] == ")", "a bracket is not closed"
    return end + 1
