"""Trainings side by side equal trainings alone, and reading carries the state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.model import LanguageModel
from experiments.harness.config import OptimizerConfig
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import init_state, make_train_step
from experiments.tasks.base import Batch
from experiments.tasks.synthetic import Counter, Parity
from experiments.tasks.synthetic.base import ACCURACY, held_out_key, sampler, training_key
from experiments.tasks.synthetic.reading import Reader, Reading, lengths_from
from experiments.trials import training
from experiments.trials.controls import Size, build
from experiments.trials.training import Training, chunk_size
from experiments.trials.trial import Lane, Trial

LANES = [Lane(seed=7, learning_rate=1e-3), Lane(seed=8, learning_rate=3e-3)]


def trial(name: str = "e88", **options: Any) -> Trial:
    model = build(name, Size(dim=16, depth=2, n_heads=2, n_state=8), 3)
    assert model is not None
    return Trial(
        **{
            "task": Counter(modulus=3),
            "model": model,
            "optimizer": OptimizerConfig(warmup_steps=2),
            "length": 8,
            "batch_size": 4,
            "steps": 6,
            **options,
        }
    )


@pytest.fixture(scope="module")
def compiled() -> Training:
    with jax.numpy_dtype_promotion("standard"):
        return Training(trial(), 2)


@pytest.fixture(scope="module")
def trained(compiled: Training) -> training.Trained:
    return compiled(LANES)


def test_each_lane_is_as_if_alone(trained: training.Trained) -> None:
    """The plain loop of the trainer's step, with the lane's own seed and rate."""
    settings, lane = trial(), LANES[1]
    optimizer = make_optimizer(settings.optimizer, settings.steps, lane.learning_rate)
    key = jax.random.fold_in(jax.random.key(2), lane.seed)
    model = nnx.jit(lambda: LanguageModel(settings.model, rngs=nnx.Rngs(params=key)))()
    state = init_state(model, optimizer, None)
    step = jax.jit(
        make_train_step(nnx.graphdef(model), optimizer, settings.optimizer.clip_norm, ACCURACY)
    )
    sample = jax.jit(lambda index: settings.task.sample(training_key(lane.seed, index), 4, 8))
    losses: list[float] = []
    for index in range(settings.steps):
        drawn = sample(index)
        state, metrics = step(state, Batch(*(x[None] for x in drawn), restart=True))
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(trained.loss[1], losses, rtol=2e-5)
    for mine, alone in zip(
        jax.tree.leaves(trained.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(mine[1], alone, atol=2e-5)


def test_seeds_and_rates_differ(trained: training.Trained) -> None:
    assert trained.steps == [1, 2, 3, 4, 5, 6]
    assert trained.accuracy.shape == trained.loss.shape == (2, 6)
    assert not np.allclose(trained.loss[0], trained.loss[1])


def test_stops_when_every_lane_has_learned(
    compiled: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any answers have learned enough at once."""
    monkeypatch.setattr(compiled, "trial", dataclasses.replace(trial(), stop_at=0.0))
    assert compiled(LANES).steps == [1]


@pytest.mark.parametrize(
    ("name", "depth"), [("e88", 1), ("gdn_negative", 1), ("transformer", 1), ("hybrid", 2)]
)
def test_reading_in_windows_equals_reading_at_once(name: str, depth: int) -> None:
    model = build(name, Size(dim=16, depth=depth, n_heads=2, n_state=8), 3)
    assert model is not None
    whole = nnx.jit(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))()
    graphdef, params = nnx.split(whole)
    task = Counter(modulus=3)
    drawn = sampler(task, 16, 20)(held_out_key(0))
    logits, _ = jax.jit(whole)(drawn.inputs)
    expected = np.mean(np.argmax(logits, axis=-1) == drawn.targets)
    lanes = jax.tree.map(lambda x: jnp.stack([x, 0 * x]), params)
    readings = [Reading(task=task, length=n) for n in (4, 20)]  # 20 is two windows and 4
    reader = Reader(graphdef, lanes, readings, window=8, batches=1, batch_size=16)
    _, read = reader(lanes)
    zeros = np.mean(np.asarray(drawn.targets) == 0)  # of a model whose logits are all alike
    np.testing.assert_allclose(read, [expected, zeros], atol=1 / 320 + 1e-9)


def test_only_answers_that_are_asked_count() -> None:
    model = build("e88", Size(dim=16, depth=1, n_heads=2, n_state=8), 2)
    assert model is not None
    graphdef, params = nnx.split(LanguageModel(model, rngs=nnx.Rngs(0)))
    lane = jax.tree.map(lambda x: 0 * x[None], params)
    task = Parity(answers="last", min_length=3)
    reading = Reading(task=task, length=8)
    reader = Reader(graphdef, lane, [reading], window=8, batches=2, batch_size=32)
    ((read,),) = reader(lane)
    drawn = [sampler(task, 32, 8)(held_out_key(i)) for i in range(2)]
    zeros = [np.sum(np.asarray(x.weights) * (np.asarray(x.targets) == 0)) for x in drawn]
    assert read == pytest.approx(sum(zeros) / 64)


def test_chunks_divide_the_steps() -> None:
    for steps in (1, 7, 39, 40, 41, 240, 10_000, 22_500, 100_000):
        size = chunk_size(steps)
        assert steps % size == 0
        assert size == 1 or steps // size >= training.CHUNKS
    assert chunk_size(10_000) == 250


def test_lengths_double() -> None:
    assert lengths_from(40, 4096) == [40, 80, 160, 320, 640, 1280, 2560]
    assert lengths_from(64, 64) == [64]
