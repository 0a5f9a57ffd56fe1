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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e88_jax.model import LanguageModel
from e88_jax.xla import xla_options
from experiments.harness.optimizer import Params, make_optimizer
from experiments.harness.step import StepMetrics, TrainState, init_state, make_train_step
from experiments.tasks.base import Batch
from experiments.tasks.synthetic.base import ACCURACY, training_key

from .trial import Lane, Trial

CHUNKS = 40
"""Calls of the device into which a training is divided; points of the training curve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights and how the training went, for each lane."""

    graphdef: nnx.GraphDef[LanguageModel]
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


def train(
    trial: Trial, lanes: Sequence[Lane], advanced: Callable[[int, float], None] = lambda *_: None
) -> Trained:
    """Trains each lane as if alone.

    Args:
        trial: what to train.
        lanes: seeds and rates. The lanes are divided over the devices if their number allows.
        advanced: called after each chunk with the steps done and the lanes' mean accuracy.
    """
    seeds = jnp.asarray([lane.seed for lane in lanes], jnp.int32)
    rates = jnp.asarray([lane.learning_rate for lane in lanes], jnp.float32)
    by_lane = _over_devices(len(lanes))
    seeds, rates = jax.device_put((seeds, rates), by_lane)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _new_model(trial, jax.random.key(0))))
    size = chunk_size(trial.steps)

    def start(seed: Array, rate: Array) -> TrainState:
        model = _new_model(trial, jax.random.fold_in(jax.random.key(2), seed))
        return init_state(model, make_optimizer(trial.optimizer, trial.steps, rate), None)

    def chunk(
        state: TrainState, seed: Array, rate: Array, first: Array
    ) -> tuple[TrainState, StepMetrics]:
        optimizer = make_optimizer(trial.optimizer, trial.steps, rate)
        step = make_train_step(graphdef, optimizer, trial.optimizer.clip_norm, ACCURACY)

        def body(state: TrainState, index: Array) -> tuple[TrainState, StepMetrics]:
            key = training_key(seed, index)
            drawn = trial.task.sample(key, trial.batch_size, trial.length)
            return step(state, Batch(*(x[None] for x in drawn), restart=True))

        state, metrics = lax.scan(body, state, first + jnp.arange(size))
        return state, jax.tree.map(jnp.nanmean, metrics)

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        began = time.perf_counter()
        state = jax.jit(jax.vmap(start), out_shardings=by_lane)(seeds, rates)
        chunks = jax.vmap(chunk, (0, 0, 0, None))
        chunks = jax.jit(chunks, donate_argnums=0, out_shardings=by_lane)
        lowered = chunks.lower(state, seeds, rates, jnp.int32(0))
        run = lowered.compile(compiler_options=xla_options())
        compile_seconds = time.perf_counter() - began

        began = time.perf_counter()
        steps: list[int] = []
        curve: list[StepMetrics] = []
        for done in range(size, trial.steps + 1, size):
            state, metrics = run(state, seeds, rates, jnp.int32(done - size))
            curve.append(jax.device_get(metrics))
            steps.append(done)
            assert curve[-1].score is not None
            advanced(done, float(np.mean(curve[-1].score)))
            if trial.stop_at is not None and np.all(curve[-1].score >= trial.stop_at):
                break
        seconds = time.perf_counter() - began
        optimizer = make_optimizer(trial.optimizer, trial.steps)
        params = jax.jit(jax.vmap(optimizer.eval_params))(state.optimizer, state.params)
    stacked: Any = jax.tree.map(lambda *x: np.stack(x, axis=1), *curve)
    return Trained(
        graphdef=graphdef,
        params=params,
        steps=steps,
        accuracy=stacked.score,
        loss=stacked.loss,
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def chunk_size(steps: int) -> int:
    """Steps of a chunk: the largest divisor of `steps` that gives at least `CHUNKS` chunks."""
    return max(n for n in range(1, max(2, steps // CHUNKS + 1)) if steps % n == 0)


def _new_model(trial: Trial, key: Array) -> LanguageModel:
    return LanguageModel(trial.model, rngs=nnx.Rngs(params=key))


def _over_devices(lanes: int) -> NamedSharding:
    """Lanes over as many devices as divide them."""
    devices = jax.devices()
    n = max(n for n in range(1, len(devices) + 1) if lanes % n == 0)
    return NamedSharding(Mesh(np.array(devices[:n]), ("lanes",)), PartitionSpec("lanes"))
