"""Trainings of one trial, side by side in one program: seeds and learning rates by `jax.vmap`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from e88_jax.model import LanguageModel
from e88_jax.xla import xla_options
from experiments.harness.optimizer import Params, make_optimizer
from experiments.harness.step import StepMetrics, TrainState, init_state, make_train_step
from experiments.tasks.synthetic.base import ACCURACY, training_key

from .trial import Lane, Trial

CHUNKS = 40
"""Calls of the device into which a training is divided; points of the training curve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights and how the training went, for each lane."""

    params: Params
    """Weights to evaluate with; a leading axis of lanes."""
    steps: list[int]
    """Steps after each chunk."""
    accuracy: np.ndarray
    """Mean training accuracy of each chunk, `[lanes, chunks]`."""
    loss: np.ndarray
    """Mean loss in nats per answer, likewise."""
    seconds: float
    """Time of the steps of all lanes together, compilation left out."""
    compile_seconds: float


class Training:
    """A trial compiled for a number of lanes, on JAX's default device. It may be made in a thread
    while another one runs."""

    def __init__(self, trial: Trial, lanes: int):
        self.trial = trial
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: _new_model(trial, jax.random.key(0))))
        self._chunk_size = chunk_size(trial.steps)
        began = time.perf_counter()
        numbers = jax.ShapeDtypeStruct((lanes,), jnp.int32)
        rates = jax.ShapeDtypeStruct((lanes,), jnp.float32)
        options = xla_options(autotune=False)
        with _standard_promotion():
            start = jax.jit(jax.vmap(self._start_lane))
            self._start = start.lower(numbers, rates).compile(options)
            state = jax.eval_shape(start, numbers, rates)
            self.params = state.params
            """Shapes of the lanes' weights."""
            chunk = jax.vmap(self._run_lane, (0, 0, 0, None))
            chunk = jax.jit(chunk, donate_argnums=0)
            step = jax.ShapeDtypeStruct((), jnp.int32)
            lowered = chunk.lower(state, numbers, rates, step)
            self._run = lowered.compile(options)
        self.compile_seconds = time.perf_counter() - began

    def __call__(
        self, lanes: Sequence[Lane], advanced: Callable[[int], None] = lambda _: None
    ) -> Trained:
        """Trains each lane as if alone.

        Args:
            lanes: seeds and rates, as many as compiled for.
            advanced: called after each chunk with the steps done.
        """
        trial, size = self.trial, self._chunk_size
        seeds = np.array([lane.seed for lane in lanes], np.int32)
        rates = np.array([lane.learning_rate for lane in lanes], np.float32)
        state = self._start(seeds, rates)
        began = time.perf_counter()
        steps, curve = list[int](), list[StepMetrics]()
        for done in range(size, trial.steps + 1, size):
            state, metrics = self._run(state, seeds, rates, np.int32(done - size))
            curve.append(jax.device_get(metrics))
            steps.append(done)
            advanced(done)
            if trial.stop_at is not None and np.all(_score(curve[-1]) >= trial.stop_at):
                break
        seconds = time.perf_counter() - began
        with _standard_promotion():
            optimizer = make_optimizer(trial.optimizer, trial.steps)
            weights = jax.jit(jax.vmap(optimizer.eval_params))
            params = weights(state.optimizer, state.params)
        return Trained(
            params=params,
            steps=steps,
            accuracy=np.stack([_score(metrics) for metrics in curve], axis=1),
            loss=np.stack([np.asarray(metrics.loss) for metrics in curve], axis=1),
            seconds=seconds,
            compile_seconds=self.compile_seconds,
        )

    def _start_lane(self, seed: Array, rate: Array) -> TrainState:
        model = _new_model(self.trial, jax.random.fold_in(jax.random.key(2), seed))
        optimizer = make_optimizer(self.trial.optimizer, self.trial.steps, rate)
        return init_state(model, optimizer, None)

    def _run_lane(
        self, state: TrainState, seed: Array, rate: Array, first: Array
    ) -> tuple[TrainState, StepMetrics]:
        """A chunk of steps, with the means of their metrics."""
        trial = self.trial
        optimizer = make_optimizer(trial.optimizer, trial.steps, rate)
        step = make_train_step(self.graphdef, optimizer, trial.optimizer.clip_norm, ACCURACY)

        def body(state: TrainState, index: Array) -> tuple[TrainState, StepMetrics]:
            key = training_key(seed, index)
            return step(state, trial.task.batch(key, 1, trial.batch_size, trial.length))

        state, metrics = lax.scan(body, state, first + jnp.arange(self._chunk_size))
        return state, jax.tree.map(jnp.nanmean, metrics)


def chunk_size(steps: int) -> int:
    """Steps of a chunk: the largest divisor of `steps` that gives at least `CHUNKS` chunks."""
    return max(n for n in range(1, max(2, steps // CHUNKS + 1)) if steps % n == 0)


def _score(metrics: StepMetrics) -> np.ndarray:
    assert metrics.score is not None, "accuracy is not the loss"
    return np.asarray(metrics.score)


def _standard_promotion() -> Any:
    return jax.numpy_dtype_promotion("standard")  # optax raises floats to integer powers


def _new_model(trial: Trial, key: Array) -> LanguageModel:
    return LanguageModel(trial.model, rngs=nnx.Rngs(params=key))
