"""Accuracy of trained models on sequences of any length, with the state carried along."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from e88_jax.model import LanguageModel, LMState
from e88_jax.xla import xla_options
from experiments.harness.optimizer import Params

from .base import Sequences, SyntheticConfig, held_out_key, is_right, sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Sequences on which a trained model is read."""

    task: SyntheticConfig
    """The task trained on, or a variation of it."""
    length: int
    """Tokens of a sequence."""


class Reader:
    """Programs that read lanes of weights, for readings in windows; compiled ahead, but for weights
    that are divided over devices.

    Args:
        graphdef: of the model.
        params: weights or their shapes; a leading axis of lanes.
        readings: the sequences.
        window: tokens read at once; the state is carried from one window to the next.
        batches: number of batches of sequences.
        batch_size: sequences of a batch.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[LanguageModel],
        params: Params,
        readings: Sequence[Reading],
        *,
        window: int,
        batches: int,
        batch_size: int,
    ):
        self._graphdef = graphdef
        self._params, self._divided = _shapes(params), _are_divided(params)
        self._window, self._batches, self._rows = window, batches, batch_size
        self._needs_context = nnx.merge(graphdef, self._params).needs_context
        self._compiled: dict[Any, tuple[Any, dict[int, Any]]] = {}
        self._readings = readings
        for reading in readings:
            sampler(reading.task, batch_size, reading.length)
            self._programs(reading)

    def __call__(self, params: Params) -> list[np.ndarray]:
        """For each reading the share of right answers, `[lanes]`, on sequences that no training has
        seen."""
        return [self._read(params, reading) for reading in self._readings]

    def _read(self, params: Params, reading: Reading) -> np.ndarray:
        start, advance = self._programs(reading)
        sample = sampler(reading.task, self._rows, reading.length)
        right, asked = list[Array](), list[np.float64]()
        for batch in range(self._batches):
            # On the host: slices on the device would be a program for each place.
            drawn = Sequences(*jax.device_get(sample(held_out_key(batch))))
            state = start(params)
            for part in self._parts(drawn):
                in_part, state = advance[part.inputs.shape[1]](params, state, part)
                right.append(in_part)
                asked.append(np.sum(part.weights, dtype=np.float64))
        hits = np.sum(jax.device_get(right), axis=0, dtype=np.float64)
        return np.asarray(hits / np.sum(asked))

    def _parts(self, drawn: Sequences) -> list[Sequences]:
        begins = range(0, drawn.inputs.shape[1], self._window)
        return [Sequences(*(x[:, i : i + self._window] for x in drawn)) for i in begins]

    def _programs(self, reading: Reading) -> tuple[Any, dict[int, Any]]:
        """The lanes' states before the first token, and by width of a window its right answers
        with the states after it."""
        context = reading.length if self._needs_context else None
        widths = {min(self._window, reading.length), reading.length % self._window} - {0}
        key = frozenset(widths), context
        if key not in self._compiled:
            options = xla_options(autotune=False)
            start = jax.jit(
                jax.vmap(lambda params: self._model(params).init_state(self._rows, context)),
                compiler_options=options,
            )
            state = jax.eval_shape(start, self._params)
            advance = jax.jit(
                jax.vmap(self._advance, (0, 0, None)), donate_argnums=1, compiler_options=options
            )
            if self._divided:  # XLA chooses where the states are
                self._compiled[key] = start, dict.fromkeys(widths, advance)
                return self._compiled[key]
            compiled = {
                n: advance.lower(self._params, state, _part(self._rows, n)).compile()
                for n in widths
            }
            self._compiled[key] = start.lower(self._params).compile(), compiled
        return self._compiled[key]

    def _model(self, params: Params) -> LanguageModel:
        return nnx.merge(self._graphdef, params)

    def _advance(self, params: Params, state: LMState, part: Sequences) -> tuple[Array, LMState]:
        logits, state = self._model(params)(part.inputs, state)
        return jnp.sum(part.weights * is_right(logits, part.targets)), state


def _part(rows: int, width: int) -> Sequences:
    ids = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    return Sequences(ids, ids, jax.ShapeDtypeStruct((rows, width), jnp.float32))  # pyright: ignore


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _are_divided(tree: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, Array)]
    return any(x.sharding.num_devices > 1 for x in arrays)


def lengths_from(length: int, longest: int) -> list[int]:
    """`length`, and its multiples by powers of two up to `longest`."""
    multiples = [length]
    while 2 * multiples[-1] <= longest:
        multiples.append(2 * multiples[-1])
    return multiples
