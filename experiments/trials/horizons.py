"""Measures how long a model with weights set by hand is right, with and without noise."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from e88_jax.mixers.base import Dtype
from e88_jax.model import LanguageModel, LMState
from e88_jax.typed import jit, split
from experiments.trials import constructions as c
from experiments.trials.hand_set import SMALL

Ints = NDArray[np.int64]

CHUNK = 2048
"""Tokens of one call; the state is handed on."""
DTYPES: tuple[Dtype, ...] = "float32", "bfloat16"
AMPLITUDES = 0.16, 0.08, 0.04, 0.02, 0.01, SMALL
SATURATIONS = 3.0, 5.0, 7.0, 9.0
NOISES = 0.001, 0.01, 0.05
NOISY = "parity, linear", "error correcting"
"""Starts of the names of cases that are measured with noise."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A construction and the program that gives its answers."""

    name: str
    task: str
    build: Callable[..., LanguageModel]
    """Takes the compute dtype."""
    n_tokens: int
    answers: Callable[[Ints], Ints]
    """Targets `[B, T]` of tokens `[B, T]`."""


def sums(modulus: int) -> Callable[[Ints], Ints]:
    """The program of counters: (x_1 + ... + x_t) mod `modulus`."""
    return lambda tokens: np.cumsum(tokens, axis=1) % modulus


def products(tokens: Sequence[Sequence[int]]) -> Callable[[Ints], Ints]:
    """The program of groups: the permutations so far, first token first, in lexicographic order."""
    elements = list(itertools.permutations(range(len(tokens[0]))))
    index = {element: i for i, element in enumerate(elements)}
    table = np.array([[index[tuple(x[i] for i in s)] for x in tokens] for s in elements])

    def run(inputs: Ints) -> Ints:
        state, states = np.zeros(len(inputs), np.int64), np.empty_like(inputs)
        for t in range(inputs.shape[1]):
            state = states[:, t] = table[state, inputs[:, t]]
        return states

    return run


def swaps_of_neighbours(n: int) -> list[tuple[int, ...]]:
    """The permutations that swap i and i + 1."""
    things = tuple(range(n))
    return [(*things[:i], i + 1, i, *things[i + 2 :]) for i in range(n - 1)]


def cases() -> list[Case]:
    """Every construction."""
    s_3 = products(list(itertools.permutations(range(3))))
    s_5 = products(swaps_of_neighbours(5))
    reflections = "reflections, linear, gate 2"
    linear_parity = functools.partial(c.parity, linear_state=True, amplitude=1.0)
    exact_s_3 = functools.partial(c.symmetric_group_3, use_silu=False)
    small_swaps = functools.partial(c.adjacent_swaps, linear_state=False, amplitude=SMALL)
    return [
        Case("parity, linear", "parity", linear_parity, 2, sums(2)),
        Case(f"parity, tanh, amplitude {SMALL:.2g}", "parity", c.parity, 2, sums(2)),
        Case("flip-flop, tanh, gate 2", "parity", c.flip_flop, 2, sums(2)),
        Case("error correcting, tanh, gate 2", "parity", c.error_correcting_parity, 2, sums(2)),
        Case(f"parity twice, tanh, amplitude {SMALL:.2g}", "counter 4", c.counter_4, 4, sums(4)),
        *(
            Case(reflections, f"counter {k}", functools.partial(c.counter, k), k, sums(k))
            for k in (3, 5, 20)
        ),
        Case(reflections, "S3", c.symmetric_group_3, 6, s_3),
        Case(f"{reflections}, no SiLU", "S3", exact_s_3, 6, s_3),
        Case(reflections, "S5 swaps", c.adjacent_swaps, 4, s_5),
        Case(f"reflections, tanh, gate 2, amplitude {SMALL:.2g}", "S5 swaps", small_swaps, 4, s_5),
    ]


def sequences(n_tokens: int, count: int, length: int, seed: int) -> Ints:
    """`count` random sequences, then one of each token alone; `[count + n_tokens, length]`."""
    drawn = np.random.default_rng(seed).integers(0, n_tokens, (count, length))
    return np.concatenate([drawn, np.repeat(np.arange(n_tokens)[:, None], length, axis=1)])


def margins(
    model: LanguageModel, tokens: Ints, answers: Ints, *, noise: float = 0.0, seed: int = 0
) -> NDArray[np.float32]:
    """The right logit less the greatest other, `[B, T]`; the answer is right where it is above 0.

    Args:
        model: the model.
        tokens: `[B, T]`.
        answers: `[B, T]`.
        noise: after every token, each entry of every state gets a number uniform in +-noise.
        seed: of the noise.
    """
    graphdef, params = split(model)
    state, key, found = model.init_state(len(tokens)), jax.random.key(seed), []
    for start in range(0, tokens.shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        x, y = (jnp.asarray(a[:, chunk], jnp.int32) for a in (tokens, answers))
        if noise:
            state, key, margin = _chunk_with_noise(graphdef, params, state, x, y, noise, key)
        else:
            state, margin = _chunk(graphdef, params, state, x, y)
        found.append(np.asarray(margin))
    return np.concatenate(found, axis=1)


@functools.partial(jit, static_argnums=0)
def _chunk(
    graphdef: Any, params: Any, state: LMState, tokens: Array, answers: Array
) -> tuple[LMState, Array]:
    """The state after the tokens `[B, T]` and the margins `[B, T]`."""
    logits, state = nnx.merge(graphdef, params)(tokens, state)
    right = jax.nn.one_hot(answers, logits.shape[-1], dtype=bool)
    others = jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1)
    return state, jnp.max(jnp.where(right, logits, -jnp.inf), axis=-1) - others


@functools.partial(jit, static_argnums=0)
def _chunk_with_noise(
    graphdef: Any,
    params: Any,
    state: LMState,
    tokens: Array,
    answers: Array,
    noise: float,
    key: Array,
) -> tuple[LMState, Array, Array]:
    """`_chunk` with noise after each token, and the next key."""

    def step(carry: tuple[LMState, Array], now: tuple[Array, Array]) -> tuple[Any, Array]:
        state, key = carry
        state, margin = _chunk(graphdef, params, state, now[0][:, None], now[1][:, None])
        leaves, structure = jax.tree.flatten(state)
        key, *keys = jax.random.split(key, len(leaves) + 1)
        noisy = [
            x + jax.random.uniform(key, x.shape, x.dtype, -noise, noise)
            for x, key in zip(leaves, keys, strict=True)
        ]
        return (jax.tree.unflatten(structure, noisy), key), margin[:, 0]

    (state, key), margins = lax.scan(step, (state, key), (tokens.T, answers.T))
    return state, key, margins.T


def horizon(margins: NDArray[np.float32]) -> int:
    """The greatest length at which every answer of every sequence is right."""
    wrong = np.flatnonzero(~(margins > 0).all(axis=0))
    return int(wrong[0]) if len(wrong) else margins.shape[1]


def report(length: int, count: int, seed: int) -> None:
    """Prints the horizons of all constructions, of tanh against amplitude, and under noise."""

    def measured(case: Case, model: LanguageModel, **noise: Any) -> tuple[str, str]:
        tokens = sequences(case.n_tokens, count, length, seed)
        found = margins(model, tokens, case.answers(tokens), seed=seed, **noise)
        until = horizon(found)
        longest = f"{until:,}" if until < length else f"all {length:,}"
        return longest, f"{found[:, :until].min():.3g}" if until else "none"

    def row(*cells: object) -> None:
        print("|", " | ".join(map(str, cells)), "|", flush=True)

    row("construction", "task", "layers", "compute dtype", "right to length", "smallest margin")
    row(*["---"] * 6)
    for case in cases():
        for dtype in DTYPES:
            model = case.build(dtype=dtype)
            row(case.name, case.task, model.config.depth, dtype, *measured(case, model))

    print()
    row("tanh, float32: amplitude", "parity", "counter 5", "S5 swaps")
    row(*["---"] * 4)
    s_5 = products(swaps_of_neighbours(5))
    for amplitude in AMPLITUDES:
        options = {"linear_state": False, "amplitude": amplitude}
        tanh = [
            Case("", "", functools.partial(c.parity, **options), 2, sums(2)),
            Case("", "", functools.partial(c.counter, 5, **options), 5, sums(5)),
            Case("", "", functools.partial(c.adjacent_swaps, **options), 4, s_5),
        ]
        row(f"{amplitude:.2g}", *(measured(case, case.build(dtype="float32"))[0] for case in tanh))

    print()
    row("parity, linear, float32: decays are sigmoids of -+", *SATURATIONS)
    row(*["---"] * (1 + len(SATURATIONS)))
    unsaturated = [
        Case("", "", functools.partial(c.parity, linear_state=True, saturation=a), 2, sums(2))
        for a in SATURATIONS
    ]
    row(
        "right to length", *(measured(case, case.build(dtype="float32"))[0] for case in unsaturated)
    )

    print()
    linear_and_correcting = [case for case in cases() if case.name.startswith(NOISY)]
    row("parity, float32: noise of every state at every step, uniform in +-", *NOISES)
    row(*["---"] * (1 + len(NOISES)))
    for case in linear_and_correcting:
        row(
            case.name,
            *(measured(case, case.build(dtype="float32"), noise=noise)[0] for noise in NOISES),
        )
