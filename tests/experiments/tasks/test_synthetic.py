"""Synthetic tasks: answers by independent programs, positions, purity, refusals.

How often things are drawn is tested in `test_synthetic_frequencies.py`.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from experiments.cli.errors import UsageError
from experiments.harness.config import BatchConfig
from experiments.tasks.synthetic import (
    TASKS,
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
from experiments.tasks.synthetic.base import (
    CHANCE_ROWS,
    Tracking,
    held_out_key,
    sampler,
    training_key,
)
from tests.reference.synthetic import answers, draw

MQAR = MultiQuery(
    n_tokens=16, lengths=(8, 84, 12), pairs=(1, 2, 3), shares=(1.0, 4.0, 2.0), power=0.3
)
MANY = CHANCE_ROWS
"""Sequences of the settings whose frequencies are tested, by the same compiled programs."""
READ = 64
"""The most sequences that a program reads."""
SETTINGS = [
    (Parity(), 1, 1),
    (Parity(min_length=3), MANY, 9),
    (Counter(modulus=2), 7, 9),
    (Counter(modulus=3, answers="last"), 7, 8),
    (Counter(modulus=7), MANY, 6),
    (Counter(modulus=2**24), 1, 128),
    (Ring(states=2, answers="last", min_length=1), MANY, 5),
    (Ring(states=7, min_length=33), 7, 33),
    (Dyck(), 7, 65),
    (Dyck(max_depth=1), 1, 5),
    (Dyck(kinds=2, max_depth=3), MANY, 30),
    (Dyck(kinds=3, answers="last", min_length=2), 7, 15),
    (Group(), 7, 9),
    (Group(group="S4", tokens="swaps"), 1, 9),
    (Group(group="A5", answers="last", min_length=2), MANY, 9),
    (Group(group="S5"), MANY, 9),
    (Group(group="S5", tokens="swaps"), MANY, 9),
    (Copy(), MANY, 17),
    (Copy(alphabet=3, copied=2), MANY, 7),
    (Copy(alphabet=1, copied=1), 1, 8),
    (Recall(), 7, 64),
    (Recall(keys=3, values=2, pairs=2), MANY, 9),
    (Recall(keys=1, values=1, pairs=1), 1, 3),
    (Overwrite(), 7, 32),
    (Overwrite(keys=3, values=2, clear_probability=0.3), MANY, 13),
    (Overwrite(keys=1, values=1), 1, 3),
    (KeyedRing(), 7, 128),
    (KeyedRing(keys=2, states=3, density=0.4), MANY, 11),
    (KeyedRing(keys=1, states=12, density=1.0), 1, 39),
    (MQAR, MANY, 86),
    (MultiQuery(n_tokens=9, lengths=(4,), pairs=(1,), shares=(1.0,)), 1, 4),
    (Arithmetic(), 7, 20),
    (Arithmetic(modulus=2, min_length=2), MANY, 9),
    (Arithmetic(modulus=46341), 7, 20),
    (Arithmetic(modulus=7), 1, 2),
    (Arithmetic(brackets=True), MANY, 24),
    (Arithmetic(brackets=True, modulus=3, min_length=2), MANY, 13),
]
"""Tasks, rows and lengths."""


def named(value: Any) -> str | None:
    return value.NAME if isinstance(value, SyntheticConfig) else None


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> None:
    """Strict promotion, as in the other tests: no optimizer runs here."""


@pytest.mark.parametrize(("task", "rows", "length"), SETTINGS, ids=named)
def test_answers_are_those_of_an_independent_program(
    task: SyntheticConfig, rows: int, length: int
) -> None:
    task.check_length(length)
    inputs, targets, weights = draw(task, rows, length)
    for array, dtype in ((inputs, np.int32), (targets, np.int32), (weights, np.float32)):
        assert (array.shape, array.dtype) == ((rows, length), dtype)
    for ids in (inputs, targets):
        assert 0 <= ids.min() <= ids.max() < task.vocab_size
    assert {*np.unique(weights)} <= {0, 1}
    assert weights.any(axis=1).all()
    for tokens, right, weight in zip(inputs[:READ].tolist(), targets, weights, strict=False):
        asked = np.flatnonzero(weight).tolist()
        assert dict(zip(asked, right[asked], strict=True)) == answers(task, tokens, asked)
        if isinstance(task, Tracking):
            low = length if task.min_length is None else task.min_length
            assert low <= asked[-1] + 1 <= length
            assert asked == (asked[-1:] if task.answers == "last" else [*range(asked[-1] + 1)])


def lengths(task: SyntheticConfig, rows: int, length: int) -> set[int]:
    """Lengths of sequences, up to the last answer."""
    weights = draw(task, rows, length).weights
    return {*(length - np.argmax(weights[:, ::-1], axis=1))}


def test_lengths_are_all_those_asked_for() -> None:
    assert lengths(Ring(states=2, answers="last", min_length=1), MANY, 5) == {*range(1, 6)}
    assert lengths(Parity(min_length=3), MANY, 9) == {*range(3, 10)}
    assert lengths(Ring(states=7, min_length=33), 7, 33) == {33}
    assert lengths(Arithmetic(brackets=True, modulus=3, min_length=2), MANY, 13) == {*range(2, 14)}


def test_an_expression_fills_its_row() -> None:
    """Without brackets an expression has an odd number of tokens, so "=" makes it even."""
    assert lengths(Arithmetic(brackets=True), MANY, 24) == {24}
    assert lengths(Arithmetic(), 7, 20) == {20}
    assert lengths(Arithmetic(modulus=2, min_length=2), MANY, 9) == {2, 4, 6, 8}


def test_a_setting_of_multi_query_recall_has_its_length_and_pairs() -> None:
    weights = draw(MQAR, MANY, 86).weights
    n_pairs = weights.sum(axis=1).astype(int)
    assert {*n_pairs} == {*MQAR.pairs}
    last = 85 - np.argmax(weights[:, ::-1], axis=1)
    assert (last < np.array(MQAR.lengths)[n_pairs - 1]).all()
    assert last.max() == 82


def test_a_batch_of_few_answers_has_their_positions() -> None:
    """As many as the largest setting has pairs; rows of smaller ones have weights of 0."""
    task = MultiQuery(n_tokens=64, lengths=(16, 24), pairs=(2, 4), shares=(1.0, 1.0))
    key = training_key(0, 0)
    drawn: Any = jax.jit(lambda: task.sample(key, 12, 30))()
    batch: Any = jax.jit(lambda: task.batch(key, 3, 4, 30))()
    assert batch.positions.shape == (3, 4, 4)
    np.testing.assert_array_equal(np.reshape(batch.inputs, (12, 30)), drawn.inputs)
    at = np.reshape(batch.positions, (12, 4))
    for mine, dense in ((batch.targets, drawn.targets), (batch.weights, drawn.weights)):
        here = np.take_along_axis(np.asarray(dense), at, axis=1)
        np.testing.assert_array_equal(np.reshape(mine, (12, 4)), here)
    assert np.sum(batch.weights) == np.sum(drawn.weights)
    assert set(np.sum(np.asarray(batch.weights), axis=-1).flat) == {2.0, 4.0}
    assert Counter().batch(key, 3, 4, 30).positions is None


def test_nothing_is_cleared_without_a_probability() -> None:
    assert 32 not in draw(Overwrite(), 7, 32).inputs[:, :30]


@pytest.mark.parametrize(
    ("task", "vocab_size"),
    [
        (Parity(), 2),
        (Counter(), 5),
        (Ring(states=2), 3),
        (Ring(states=7), 7),
        (Dyck(), 9),
        (Dyck(max_depth=1), 2),
        (Dyck(kinds=2), 4),
        (Group(), 6),
        (Group(group="S4"), 24),
        (Group(group="A5"), 60),
        (Group(group="S5", tokens="swaps"), 120),
        (Copy(), 18),
        (Recall(), 33),
        (Overwrite(), 33),
        (KeyedRing(), 12),
        (KeyedRing(keys=1, states=12), 12),
        (MultiQuery(), 8192),
        (Arithmetic(), 12),
    ],
    ids=named,
)
def test_the_vocabulary_is_as_small_as_tokens_and_answers_allow(
    task: SyntheticConfig, vocab_size: int
) -> None:
    assert task.vocab_size == vocab_size


def test_the_programs_notice_sequences_that_are_not_as_described() -> None:
    wrong: list[tuple[SyntheticConfig, list[int]]] = [
        (Dyck(), [1]),
        (Dyck(max_depth=2), [0, 0, 0]),
        (Dyck(kinds=2), [0, 1, 2, 3]),
        (Copy(alphabet=3, copied=2), [0, 1, 2, 4, 3, 3]),
        (Recall(keys=2, values=1, pairs=2), [0, 2, 0, 2, 0]),
        (Arithmetic(brackets=True), [9, 0, 10, 10, 8]),
        (Arithmetic(brackets=True), [9, 9, 0, 10, 10, 8]),
        (Arithmetic(brackets=True), [0, 5, 0, 8]),
        (Arithmetic(), [0, 5, 8]),
    ]
    for task, tokens in wrong:
        with pytest.raises(AssertionError):
            answers(task, tokens, [len(tokens) - 1])


@pytest.mark.parametrize(
    ("task", "rows", "length"),
    [
        (Counter(modulus=2), 7, 9),
        (MultiQuery(n_tokens=9, lengths=(4,), pairs=(1,), shares=(1.0,)), 1, 4),
    ],
    ids=named,
)
def test_the_same_key_gives_the_same_sequences_compiled_or_not(
    task: SyntheticConfig, rows: int, length: int
) -> None:
    compiled = sampler(dataclasses.replace(task), rows, length)
    assert compiled is sampler(task, rows, length)
    for sequences in (task.sample, lambda key, *_: compiled(key)):
        drawn = sequences(jax.random.key(5), rows, length)
        for ours, expected in zip(drawn, draw(task, rows, length), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_keys_of_training_and_validation_all_differ() -> None:
    seeds, steps = (0, 1, 2, 2**32 - 1), (0, 1, 2, 3, 2**31 - 1)
    keys = [training_key(seed, step) for seed, step in itertools.product(seeds, steps)]
    keys += [held_out_key(index) for index in range(20)]
    data = [tuple(jax.random.key_data(key).tolist()) for key in keys]
    assert len({*data}) == len(data)


def test_the_stream_of_a_run() -> None:
    task = Counter(modulus=7)
    batch = BatchConfig(seq_len=33, batch_size=3, accumulate=2)
    stream, other = (
        task.open(dataclasses.replace(batch, seed=seed), None) for seed in (batch.seed, 1)
    )
    ahead = {step: stream[step] for step in (2, 0, 1)}
    for array in (ahead[0].inputs, ahead[0].targets, ahead[0].weights):
        assert isinstance(array, np.ndarray), "a thread beside an all-reduce makes no device wait"
    again = task.open(batch, None)
    for step in range(3):
        for one, two in zip(ahead[step], again[step], strict=True):
            np.testing.assert_array_equal(one, two)
    validation = stream.validation()
    assert len(validation) == 16
    for one, two in zip(validation, other.validation(), strict=True):
        np.testing.assert_array_equal(one.inputs, two.inputs)
        assert one.inputs.shape == (1, 3, 33)
        assert one.restart
    batches = [*ahead.values(), *(other[step] for step in range(3))]
    assert all(batch.inputs.shape == (2, 3, 33) for batch in batches)
    drawn = [np.asarray(batch.inputs).reshape(-1, 33) for batch in (*batches, *validation)]
    rows = [row.tobytes() for row in np.concatenate(drawn)]
    assert len({*rows}) == len(rows) == 6 * 6 + 16 * 3
    assert (stream.vocab_size, stream.tokens) == (7, "tokens")
    assert stream.describe().startswith("counter, 33 tokens, chance 0.14")


@pytest.mark.parametrize("kind", TASKS.values(), ids=list(TASKS))
def test_the_fingerprint_tells_every_flag_and_the_length(kind: type[SyntheticConfig]) -> None:
    changes: dict[str, Any] = {
        "answers": "last",
        "group": "S4",
        "tokens": "swaps",
        "brackets": True,
        "min_length": 5,
        "lengths": (64, 128, 256, 256, 260),
        "pairs": (4, 8, 16, 32, 63),
        "shares": (4.0, 1.0, 1.0, 1.0, 1.0),
    }
    tasks: list[SyntheticConfig] = [kind()]
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name)
        if type(value) is int:
            changed = value - 1 if value > 2 else value + 1
        elif type(value) is float:
            changed = value / 2 + 0.125
        else:
            changed = changes[field.name]
        tasks.append(dataclasses.replace(kind(), **{field.name: changed}))
    streams = [task.open(BatchConfig(seq_len=300), None) for task in tasks]
    streams.append(tasks[0].open(BatchConfig(seq_len=301), None))
    prints = [stream.fingerprint() for stream in streams]
    assert len({*prints}) == len(prints)
    same = BatchConfig(seq_len=300, seed=3, batch_size=2)
    assert kind().open(same, None).fingerprint() == prints[0]


def refuse(kind: type[SyntheticConfig], sentence: str, **flags: Any) -> tuple[Any, ...]:
    return kind, flags, sentence


@pytest.mark.parametrize(
    ("kind", "flags", "sentence"),
    [
        refuse(Parity, "--min-length must be at least 1, got 0.", min_length=0),
        refuse(Counter, "--min-length must be at least 1, got -1.", min_length=-1),
        refuse(Counter, "--modulus must be at least 2, got 1.", modulus=1),
        refuse(Ring, "--states must be at least 2, got 1.", states=1),
        refuse(Ring, "--min-length must be at least 1, got 0.", min_length=0),
        refuse(Dyck, "--kinds must be at least 1, got 0.", kinds=0),
        refuse(Dyck, "--max-depth must be at least 1, got 0.", max_depth=0),
        refuse(Dyck, "--min-length must be at least 1, got 0.", min_length=0),
        refuse(
            Group,
            "--tokens swaps are not elements of --group A5.",
            group="A5",
            tokens="swaps",
        ),
        refuse(Group, "--min-length must be at least 1, got 0.", min_length=0),
        refuse(Copy, "--alphabet must be at least 1, got 0.", alphabet=0),
        refuse(Copy, "--copied must be at least 1, got 0.", copied=0),
        refuse(Recall, "--keys must be at least 1, got 0.", keys=0),
        refuse(Recall, "--values must be at least 1, got 0.", values=0),
        refuse(Recall, "--pairs must be at least 1, got 0.", pairs=0),
        refuse(Recall, "--pairs 4 of distinct keys need as many --keys, got 3.", pairs=4, keys=3),
        refuse(Overwrite, "--keys must be at least 1, got 0.", keys=0),
        refuse(Overwrite, "--values must be at least 1, got 0.", values=0),
        refuse(Overwrite, "--clear-probability must be below 1, got 1.0.", clear_probability=1.0),
        refuse(
            Overwrite, "--clear-probability must be at least 0, got -0.5.", clear_probability=-0.5
        ),
        refuse(KeyedRing, "--keys must be at least 1, got 0.", keys=0),
        refuse(KeyedRing, "--states must be at least 2, got 1.", states=1),
        refuse(KeyedRing, "--density must be above 0, got 0.0.", density=0.0),
        refuse(KeyedRing, "--density must be at most 1, got 1.5.", density=1.5),
        refuse(MultiQuery, "--n-tokens must be at least 4, got 3.", n_tokens=3),
        refuse(MultiQuery, "--power must be above 0, got 0.0.", power=0.0),
        refuse(MultiQuery, "--shares must be above 0, got -1.0.", shares=(1.0, -1.0)),
        refuse(
            MultiQuery,
            "--lengths, --pairs and --shares need as many values each, got 1, 5 and 5.",
            lengths=(64,),
        ),
        refuse(
            MultiQuery,
            "--pairs 4 need --lengths of 16, got 15.",
            lengths=(15,),
            pairs=(4,),
            shares=(1.0,),
        ),
        refuse(
            MultiQuery,
            "--pairs 64 need as many keys, half of --n-tokens 127.",
            n_tokens=127,
        ),
        refuse(Arithmetic, "--modulus must be at least 2, got 1.", modulus=1),
        refuse(Arithmetic, "--modulus must be below 46342, got 46342.", modulus=46342),
        refuse(Arithmetic, "--min-length must be at least 2, got 1.", min_length=1),
    ],
)
def test_bad_flags(kind: type[SyntheticConfig], flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        kind(**flags)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("task", "length", "sentence"),
    [
        (Parity(min_length=9), 8, "8 is shorter than --min-length 9."),
        (
            Counter(modulus=2**24 + 1),
            128,
            "128 times --modulus 16777217 must be below 2**31, as sums are int32.",
        ),
        (Group(min_length=2), 1, "1 is shorter than --min-length 2."),
        (Copy(), 16, "16 is too short for --copied 8 tokens, GO and their copies, 17."),
        (Recall(), 16, "16 is too short for --pairs 8 and a query, 17."),
        (Overwrite(), 2, "2 is too short for a write and a query, 3."),
        (KeyedRing(), 2, "2 is too short for a move and a query, 3."),
        (MultiQuery(), 255, "255 is shorter than --lengths 256."),
        (Arithmetic(), 1, '1 is too short for an expression and "=", 2.'),
        (Arithmetic(min_length=9), 8, "8 is shorter than --min-length 9."),
    ],
    ids=named,
)
def test_lengths_that_do_not_fit(task: SyntheticConfig, length: int, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        task.open(BatchConfig(seq_len=length), None)
    assert str(error.value) == f"--seq-len: {sentence}"


@pytest.mark.parametrize("kind", TASKS.values(), ids=list(TASKS))
def test_a_state_is_not_carried(kind: type[SyntheticConfig]) -> None:
    with pytest.raises(UsageError, match="--stateful continues sequences from step to step"):
        kind().open(BatchConfig(seq_len=512, stateful=True), None)
