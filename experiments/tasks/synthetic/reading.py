"""Accuracy of trained models on sequences of any length, with the state carried along."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from e88_jax.model import LanguageModel, LMState
from experiments.harness.optimizer import Params

from .base import Sequences, SyntheticConfig, held_out_key, is_right, sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Sequences on which a trained model is read."""

    task: SyntheticConfig
    """The task trained on, or a variation of it."""
    length: int
    """Tokens of a sequence."""


def accuracy(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Params,
    reading: Reading,
    *,
    window: int,
    batches: int,
    batch_size: int,
) -> np.ndarray:
    """Share of right answers, `[lanes]`, on sequences that no training has seen.

    Args:
        graphdef: of the model.
        params: weights; a leading axis of lanes.
        reading: the sequences.
        window: tokens read at once; the state is carried from one window to the next.
        batches: number of batches of sequences.
        batch_size: sequences of a batch.
    """
    needs_context = nnx.merge(graphdef, params).needs_context
    start, advance = _programs(graphdef, batch_size, reading.length if needs_context else None)
    right, asked = np.float64(0), 0.0
    for batch in range(batches):
        drawn = sampler(reading.task, batch_size, reading.length)(held_out_key(batch))
        asked += float(drawn.weights.sum())
        state = start(params)
        for begin in range(0, reading.length, window):
            part = Sequences(*(x[:, begin : begin + window] for x in drawn))
            hits, state = advance(params, state, part)
            right = right + np.asarray(hits, np.float64)
    return np.asarray(right) / asked


@functools.lru_cache(maxsize=8)
def _programs(
    graphdef: nnx.GraphDef[LanguageModel], rows: int, context: int | None
) -> tuple[Callable[[Params], LMState], Callable[..., tuple[Array, LMState]]]:
    """Compiled functions: the lanes' states before the first token, and one window's right answers
    with the states after it."""

    def start(params: Params) -> LMState:
        return nnx.merge(graphdef, params).init_state(rows, context)

    def advance(params: Params, state: LMState, part: Sequences) -> tuple[Array, LMState]:
        logits, state = nnx.merge(graphdef, params)(part.inputs, state)
        return jnp.sum(part.weights * is_right(logits, part.targets)), state

    # The states are carried, and given up.
    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance, (0, 0, None)), donate_argnums=1)


def lengths_from(length: int, longest: int) -> list[int]:
    """`length`, and its multiples by powers of two up to `longest`."""
    multiples = [length]
    while 2 * multiples[-1] <= longest:
        multiples.append(2 * multiples[-1])
    return multiples
