"""How often synthetic tasks draw what: within 6 standard deviations of exact probabilities."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

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
from experiments.tasks.synthetic.base import CHANCE_ROWS
from tests.reference.synthetic import bracketed_end, draw, permutations, permuted

MANY = CHANCE_ROWS
"""Sequences; chance levels are counted by the same compiled programs."""
SIGMAS = 6


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> None:
    """Strict promotion, as in the other tests: no optimizer runs here."""


def assert_shares(drawn: Any, shares: Sequence[float]) -> None:
    """Asserts that independent values have these probabilities, value i the i-th."""
    counts = np.bincount(np.ravel(drawn), minlength=len(shares))
    assert len(counts) == len(shares)
    n, p = counts.sum(), np.asarray(shares) / np.sum(shares)
    assert n >= 1000
    np.testing.assert_array_less(np.abs(counts - n * p), SIGMAS * np.sqrt(n * p * (1 - p)) + 1e-6)


def assert_uniform(drawn: Any, n: int) -> None:
    assert_shares(drawn, [1 / n] * n)


def numbered(rows: np.ndarray, values: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The index in `values` of each row."""
    ids = {value: i for i, value in enumerate(values)}
    return np.array([ids[tuple(row)] for row in rows.tolist()])


def test_a_wrong_share_is_noticed() -> None:
    drawn = np.random.default_rng(0).integers(0, 4, MANY)
    assert_uniform(drawn, 4)
    with pytest.raises(AssertionError):
        assert_shares(drawn, [0.22, 0.26, 0.26, 0.26])
    with pytest.raises(AssertionError):
        assert_uniform(drawn, 5)


@pytest.mark.parametrize(
    ("task", "length"),
    [
        (Parity(min_length=3), 9),
        (Counter(modulus=7), 6),
        (Group(group="A5", answers="last", min_length=2), 9),
        (Group(group="S5"), 9),
    ],
    ids=lambda value: value.NAME if isinstance(value, SyntheticConfig) else None,
)
def test_tokens_and_states_of_a_group_are_uniform(task: SyntheticConfig, length: int) -> None:
    """They are independent of each other too, from one position to the next."""
    inputs, states, _ = draw(task, MANY, length)
    for drawn in (inputs, states):
        assert_uniform(drawn, task.vocab_size)
        for position in (0, length - 1):
            assert_uniform(drawn[:, position], task.vocab_size)
    if (n := task.vocab_size) <= 7:
        assert_uniform(states[:, 1] * n + states[:, 2], n * n)


def test_lengths_are_uniform() -> None:
    inputs, _, weights = draw(Parity(min_length=3), MANY, 9)
    assert_uniform((weights.sum(axis=1).astype(int) - 3) * 2 + inputs[:, 0], 14)
    weights = draw(Group(group="A5", answers="last", min_length=2), MANY, 9).weights
    assert_uniform(np.argmax(weights, axis=1) - 1, 8)
    weights = draw(Arithmetic(brackets=True, modulus=3, min_length=2), MANY, 13).weights
    assert_uniform(np.argmax(weights, axis=1) - 1, 12)
    weights = draw(Arithmetic(modulus=2, min_length=2), MANY, 9).weights
    assert_uniform((np.argmax(weights, axis=1) - 1) // 2, 4)


def test_moves_and_swaps_are_uniform() -> None:
    assert_uniform(draw(Ring(states=2, answers="last", min_length=1), MANY, 5).inputs, 3)
    assert_uniform(draw(Group(group="S5", tokens="swaps"), MANY, 9).inputs, 4)


def test_brackets_open_and_close_alike_away_from_the_bounds() -> None:
    task, length = Dyck(kinds=2, max_depth=3), 30
    inputs = draw(task, MANY, length).inputs
    opens = inputs < 2
    depth = np.cumsum(np.where(opens, 1, -1), axis=1)
    before = np.pad(depth[:, :-1], ((0, 0), (1, 0)))
    assert opens[before == 0].all()
    assert not opens[before == 3].any()
    between = (before > 0) & (before < 3)
    assert_uniform(opens[between].astype(int), 2)
    assert_uniform(opens[between[:, -1], -1].astype(int), 2)
    assert_uniform(inputs[opens], 2)


def test_copied_tokens_and_their_places_are_uniform() -> None:
    task, length = Copy(alphabet=3, copied=2), 7
    inputs, targets, _ = draw(task, MANY, length)
    places = np.nonzero(inputs[:, :4] < 3)[1].reshape(MANY, 2)
    place = numbered(places, [*itertools.combinations(range(4), 2)])
    assert_uniform((place * 3 + targets[:, -2]) * 3 + targets[:, -1], 54)


def test_recalled_pairs_their_places_and_queries_are_uniform() -> None:
    task, length = Recall(keys=3, values=2, pairs=2), 9
    inputs, _, _ = draw(task, MANY, length)
    first, second, query = inputs[:, :-1:2], inputs[:, 1:-1:2], inputs[:, -1]
    places = np.nonzero(first < 3)[1].reshape(MANY, 2)
    keys = first[first < 3].reshape(MANY, 2)
    place = numbered(places, [*itertools.combinations(range(4), 2)])
    key = numbered(keys, [*itertools.permutations(range(3), 2)])
    value = second[first < 3].reshape(MANY, 2) - 3
    asked = (keys[:, 1] == query).astype(int)
    assert_uniform(place * 6 + key, 36)
    assert_uniform(((key * 2 + value[:, 0]) * 2 + value[:, 1]) * 2 + asked, 48)


def test_writes_are_uniform_and_the_query_is_one_of_them() -> None:
    task, length = Overwrite(keys=3, values=2, clear_probability=0.3), 13
    inputs, _, _ = draw(task, MANY, length)
    keys, values, query = inputs[:, :-1:2], inputs[:, 1::2], inputs[:, -1]
    assert_shares(keys * 3 + values - 3, [0.35, 0.35, 0.3] * 3)
    share = np.mean(keys == 0, axis=1)  # probability that the query is key 0
    bound = SIGMAS * math.sqrt(np.sum(share * (1 - share)))
    assert abs(np.sum((query == 0) - share)) < bound


def test_moves_of_rings_their_places_and_queries_are_uniform() -> None:
    task, length = KeyedRing(keys=2, states=3, density=0.4), 11
    inputs, _, _ = draw(task, MANY, length)
    keys, moves, query = inputs[:, :-1:2], inputs[:, 1:-1:2], inputs[:, -1]
    places = np.nonzero(keys < 2)[1].reshape(MANY, 2)
    moved = keys[keys < 2].reshape(MANY, 2), moves[keys < 2].reshape(MANY, 2) - 2
    drawn = [key * 3 + move for key, move in zip(*(x.T for x in moved), strict=True)]
    assert_uniform((drawn[0] * 6 + drawn[1]) * 2 + query, 72)
    place = numbered(places, [*itertools.combinations(range(5), 2)])
    assert_uniform(place * 2 + query, 20)


MQAR = MultiQuery(
    n_tokens=16, lengths=(8, 84, 12), pairs=(1, 2, 3), shares=(1.0, 4.0, 2.0), power=0.3
)
"""As in test_synthetic.py."""


def test_settings_of_multi_query_recall_have_their_shares() -> None:
    _, _, weights = draw(MQAR, MANY, 86)
    assert_shares(weights.sum(axis=1).astype(int) - 1, MQAR.shares)


def test_distances_of_multi_query_recall_follow_the_power_law() -> None:
    """The second key finds a place taken: its density is the sum over i of p_i p_j / (1 - p_i)."""
    inputs, _, weights = draw(MQAR, MANY, 86)
    chosen = weights.sum(axis=1) == 2
    inputs, asked = inputs[chosen], np.nonzero(weights[chosen])[1].reshape(-1, 2)
    assert not ((asked - 4) % 2).any()
    asked_first = np.take_along_axis(inputs, asked, axis=1) == inputs[:, :1]
    n_places = (84 - 4) // 2
    p = np.arange(1.0, n_places + 1) ** (0.3 - 1)
    p /= p.sum()
    first = (asked[asked_first] - 4) // 2
    assert_shares(first, list(p))
    logs = np.log(np.arange(1, n_places + 1))  # their mean tells the exponent
    deviation = np.sqrt(p @ logs**2 - (p @ logs) ** 2)
    assert abs(np.mean(logs[first]) - p @ logs) < SIGMAS * deviation / math.sqrt(len(first))
    assert_shares((asked[~asked_first] - 4) // 2, list(p * (np.sum(p / (1 - p)) - p / (1 - p))))


def test_keys_values_and_fillers_of_multi_query_recall_are_uniform() -> None:
    inputs, _, weights = draw(MQAR, MANY, 86)
    chosen = weights.sum(axis=1) == 2
    inputs, weights = inputs[chosen], weights[chosen]
    for position in (0, 2):
        assert_uniform(inputs[:, position] * 8 + inputs[:, position + 1] - 8, 64)
    pairs = inputs[:, 0] * 8 + inputs[:, 2]
    assert_shares(pairs, [float(i % 8 != i // 8) for i in range(64)])
    assert_uniform(inputs[:, 4:][weights[:, 4:] == 0], 16)


def test_expressions_are_uniform_where_they_are_drawn() -> None:
    modulus, size = 5, 23
    inputs, _, _ = draw(Arithmetic(brackets=True), MANY, size + 1)
    assert_uniform(inputs[inputs < modulus], modulus)
    words = np.array([*"01234+-*=() "])[inputs]
    ends = np.array([bracketed_end(row, 1) for row in words.tolist()])
    assert_uniform(ends - 2, size - 4)
    operators = inputs[np.arange(MANY), ends] - modulus
    assert_uniform(ends[ends < 7] * 3 - 6 + operators[ends < 7], 15)
    inputs, _, _ = draw(Arithmetic(modulus=2, min_length=2), MANY, 9)
    first, operator, second = inputs[inputs[:, 1] < 5, :3].T
    assert_uniform((first * 3 + operator - 2) * 2 + second, 12)


def of_brackets(max_depth: int, length: int) -> list[float]:
    """Share of each depth over all positions."""
    steps = np.zeros((max_depth + 1, max_depth + 1))
    for depth in range(max_depth + 1):
        ways = {abs(depth - 1), depth + 1 if depth < max_depth else depth - 1}
        steps[depth, [*ways]] = 1 / len(ways)
    return _mean_of_walk(steps, length)


def of_swaps(group: str, length: int) -> list[float]:
    """Share of each permutation over all positions."""
    elements, n = permutations(group), int(group[1:])
    steps = np.zeros((len(elements), len(elements)))
    for i, places in enumerate(elements):
        for swap in range(n - 1):
            exchanged = {swap: swap + 1, swap + 1: swap}
            after = tuple(exchanged.get(place, place) for place in places)
            steps[i, elements.index(after)] += 1 / (n - 1)
    return _mean_of_walk(steps, length)


def _mean_of_walk(steps: np.ndarray, length: int) -> list[float]:
    at, total = np.eye(len(steps))[0], np.zeros(len(steps))
    for _ in range(length):
        at = at @ steps
        total += at
    return (total / length).tolist()


def test_the_first_permutation_is_where_a_walk_begins() -> None:
    assert permutations("S5")[0] == (0, 1, 2, 3, 4)
    assert permuted([0, 0], "S5", swaps=True)[-1] == 0


@pytest.mark.parametrize(
    ("task", "length", "shares"),
    [
        (Parity(min_length=3), 9, [1 / 2] * 2),
        (Counter(modulus=7), 6, [1 / 7] * 7),
        (Dyck(max_depth=3), 10, of_brackets(3, 10)),
        (Group(group="S5"), 9, [1 / 120] * 120),
        (Group(group="A5", answers="last", min_length=2), 9, [1 / 60] * 60),
        (Group(group="S5", tokens="swaps"), 9, of_swaps("S5", 9)),
        (Copy(), 17, [1 / 16] * 16),
        (Recall(keys=3, values=2, pairs=2), 9, [1 / 2] * 2),
    ],
    ids=lambda value: value.NAME if isinstance(value, SyntheticConfig) else None,
)
def test_chance_is_the_share_of_the_most_frequent_answer(
    task: SyntheticConfig, length: int, shares: list[float]
) -> None:
    """Answers of one sequence may depend on each other, so the bound counts sequences."""
    assert sum(shares) == pytest.approx(1)
    p = max(shares)
    assert abs(task.chance(length) - p) < SIGMAS * math.sqrt(p * (1 - p) / MANY)


def test_chance_needs_two_batches_of_any_size() -> None:
    assert Parity().chance(1, rows=20_000) == pytest.approx(0.5, abs=0.03)
