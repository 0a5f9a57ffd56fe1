"""The training step: accumulation, clipping, skipping, carried state; optimizers; evaluation."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import experiments.harness.step
from e88_jax import AttentionConfig, LanguageModel, LMConfig, LSTMConfig
from e88_jax.model import LMState
from experiments.harness.config import OptimizerConfig
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import (
    TrainState,
    init_state,
    make_evaluate,
    make_train_step,
    mean_loss,
)
from experiments.tasks.base import Batch, Metric
from experiments.tasks.bytes import BITS_PER_BYTE
from tests.experiments.harness.steps import CONFIG, batch_of, for_rows, plain, windows_of

ACCURACY = Metric(
    "accuracy",
    "of targets",
    "higher",
    per_target=lambda logits, targets: (jnp.argmax(logits, -1) == targets).astype(jnp.float32),
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


def loss_of(model: LanguageModel, windows: np.ndarray, state: LMState | None = None) -> Any:
    """Loss of windows `[rows, T + 1]`, and the state at their end."""
    graphdef, params = nnx.split(model)
    return _loss_of(graphdef, params, batch_of(windows), state)


@functools.partial(jax.jit, static_argnums=0)
def _loss_of(graphdef: Any, params: Any, batch: Batch, state: LMState | None) -> Any:
    loss, (_, state) = mean_loss(nnx.merge(graphdef, params), batch, state)
    return loss, state


def make(
    model: LanguageModel,
    config: OptimizerConfig,
    carry_shape: tuple[int, int] | None = None,
    metric: Metric = BITS_PER_BYTE,
):
    optimizer = make_optimizer(config, steps=20)
    step = jax.jit(make_train_step(nnx.graphdef(model), optimizer, config.clip_norm, metric))
    return step, init_state(model, optimizer, carry_shape), optimizer


@pytest.fixture(scope="module")
def scored(model: LanguageModel) -> tuple[Any, TrainState]:
    """A step that measures accuracy too, for windows `[2, 4, 10]` and targets of weights, and the
    state before it."""
    with jax.numpy_dtype_promotion("standard"):
        return make(model, plain(), metric=ACCURACY)[:2]


@nnx.jit
def logits_of(model: LanguageModel, tokens: Any) -> jax.Array:
    return model(jnp.asarray(tokens, jnp.int32))[0]


def test_accumulation_equals_one_large_batch(model: LanguageModel):
    step, state, optimizer = make(model, plain())
    windows = windows_of((4, 2, 10))
    small, small_metrics = step(state, batch_of(windows))
    np.testing.assert_allclose(small_metrics.learning_rate, optimizer.schedule(0), rtol=1e-6)
    assert small_metrics.score is None
    large, large_metrics = step(state, batch_of(windows.reshape(1, 8, 10)))
    chex.assert_trees_all_close(small_metrics, large_metrics, rtol=1e-5)
    # Adam's first update is the sign of the gradient, so compare its moments.
    chex.assert_trees_all_close(small.optimizer[0].mu, large.optimizer[0].mu, rtol=1e-3, atol=1e-7)


def test_targets_at_positions_equal_all_with_weights(
    model: LanguageModel, scored: tuple[Any, TrainState]
):
    """Two targets in a row of nine, one of them of weight 0 in some rows."""
    rng = np.random.default_rng(0)
    windows = windows_of((2, 4, 10))
    positions = np.argsort(rng.random((2, 4, 9)), axis=-1)[..., :2].astype(np.int32)
    weights = np.array([[1.0, 0.5], [2.0, 0.0]] * 4, np.float32).reshape(2, 4, 2)
    dense = np.zeros((2, 4, 9), np.float32)
    np.put_along_axis(dense, positions, weights, axis=-1)
    of_all = batch_of(windows, weights=dense)
    targets = np.take_along_axis(of_all.targets, positions, axis=-1)
    of_few = of_all._replace(targets=targets, weights=weights, positions=positions)
    step, state = scored
    for few, every in zip(step(state, of_few), step(state, of_all), strict=True):
        chex.assert_trees_all_close(few, every, rtol=1e-4, atol=1e-6)
    where = for_rows(4)
    put: Any = where.put(of_few)
    assert put.positions.sharding == where.by_row
    evaluate = [
        make_evaluate(nnx.graphdef(model), [batch], where, ACCURACY, stateful=False)
        for batch in (of_few, of_all)
    ]
    few, every = (f(state.params) for f in evaluate)
    assert few == pytest.approx(every, rel=1e-6)


def test_gradient_is_clipped_to_the_norm(model: LanguageModel):
    config = plain(clip_norm=0.01, beta1=0.5)
    step, state, _ = make(model, config)
    state, metrics = step(state, batch_of(windows_of((1, 2, 10))))
    assert metrics.grad_norm > 0.1
    np.testing.assert_allclose(optax.tree.norm(state.optimizer[0].mu), 0.01 * 0.5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "muon"])
def test_each_optimizer_learns(model: LanguageModel, optimizer: str):
    step, state, chosen = make(model, plain(optimizer=optimizer, learning_rate=1e-2))
    windows = windows_of((1, 4, 17))
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of(windows))
        losses.append(float(metrics.loss))
    first, *_, last = losses
    assert last < 0.9 * first
    batches = [batch_of(windows)]
    evaluate = make_evaluate(
        nnx.graphdef(model), batches, for_rows(4), BITS_PER_BYTE, stateful=False
    )
    weights = chosen.eval_params(state.optimizer, state.params)
    assert evaluate(weights) < 0.95 * first / np.log(2)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "muon"])
def test_weight_decay_spares_rates_and_norms(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    def loss(model: LanguageModel, *_: object) -> tuple[jax.Array, tuple[None, None]]:
        """One whose gradient is 1 everywhere, also where weights have decayed."""
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, nnx.state(model))), (None, None)

    monkeypatch.setattr(experiments.harness.step, "mean_loss", loss)
    updated = []
    for weight_decay in (0.0, 1.0):
        config = plain(optimizer=optimizer, weight_decay=weight_decay, warmup_steps=0)
        step, state, _ = make(model, config)
        for seed in range(2):
            state, _ = step(state, batch_of(windows_of((1, 2, 10), seed)))
        updated.append(state.params)
    without, with_decay = updated
    mixer, decayed = without["blocks"][0]["mixer"], with_decay["blocks"][0]["mixer"]
    chex.assert_trees_all_close(mixer["decay"], decayed["decay"], rtol=1e-6)
    chex.assert_trees_all_close(
        without["blocks"][0]["norm"], with_decay["blocks"][0]["norm"], rtol=1e-6
    )
    for part, name in (
        *(("inputs", x) for x in ("qkv", "gate", "decay")),
        ("heads", "projection"),
    ):
        before, after = (x[part][name]["kernel"][...] for x in (mixer, decayed))
        assert jnp.linalg.norm(after) < 0.9995 * jnp.linalg.norm(before)
    assert jnp.linalg.norm(with_decay["embed"]["embedding"][...]) < 0.9995 * jnp.linalg.norm(
        without["embed"]["embedding"][...]
    )


def poisoned(state: TrainState) -> TrainState:
    params = jax.tree.map(jnp.copy, state.params)
    params["norm"]["scale"] = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params["norm"]["scale"])
    return state._replace(params=params)


def test_a_step_that_is_not_finite_changes_nothing(model: LanguageModel):
    step, state, _ = make(model, plain(), carry_shape=(1, 2))
    state, _ = step(state, batch_of(windows_of((1, 2, 10))))
    bad = poisoned(state)
    after, metrics = step(bad, batch_of(windows_of((1, 2, 10), 1), restart=False))
    assert not np.isfinite(metrics.loss)
    for name in ("params", "optimizer", "carry", "updates"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(bad, name))
    assert (after.skipped, after.skipped_in_a_row) == (1, 1)
    after, _ = step(after, batch_of(windows_of((1, 2, 10), 1), restart=False))
    assert (after.skipped, after.skipped_in_a_row) == (2, 2)
    good, metrics = step(after._replace(params=state.params), batch_of(windows_of((1, 2, 10))))
    assert np.isfinite(metrics.loss)
    assert (good.updates, good.skipped, good.skipped_in_a_row) == (2, 2, 0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_a_gradient_alone_that_is_not_finite(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, what: str
):
    def loss(model: LanguageModel, *_: object) -> tuple[jax.Array, tuple[None, None]]:
        scale: Any = model.norm.scale
        total = jnp.sum(scale[...])
        return (jnp.inf + total if what == "loss" else jnp.sqrt(0 * total)), (None, None)

    monkeypatch.setattr(experiments.harness.step, "mean_loss", loss)
    step, state, _ = make(model, plain())
    after, metrics = step(state, batch_of(windows_of((1, 2, 10))))
    assert np.isfinite(metrics.loss) == (what == "gradient")
    assert np.isfinite(metrics.grad_norm) == (what == "loss")
    chex.assert_trees_all_equal(after.params, state.params)
    assert (after.updates, after.skipped) == (0, 1)


def test_stateful_training_carries_the_state_and_truncates(model: LanguageModel):
    step, state, _ = make(model, plain(), carry_shape=(2, 3))
    long = windows_of((2, 3, 21))
    first, second = long[..., :11], long[..., 10:]
    after, _ = step(state, batch_of(first))
    tokens = first.reshape(6, 11)
    _, expected = loss_of(model, tokens)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), after.carry), expected, atol=1e-5
    )
    # The loss of the second window is that of a model that has read the first.
    frozen = after._replace(params=state.params)
    _, continued = step(frozen, batch_of(second, restart=False))
    loss, _ = loss_of(model, second.reshape(6, 11), expected)
    np.testing.assert_allclose(continued.loss, loss, rtol=1e-5)
    _, restarted = step(frozen, batch_of(second))
    fresh, _ = loss_of(model, second.reshape(6, 11))
    np.testing.assert_allclose(restarted.loss, fresh, rtol=1e-5)
    assert abs(float(continued.loss - restarted.loss)) > 1e-6


def test_weights_are_of_targets_over_all_passes(
    model: LanguageModel, scored: tuple[Any, TrainState]
):
    """Only their ratios count; weights of 1 are none; a target of weight 0 has no gradient."""
    step, state = scored
    windows = windows_of((2, 4, 10))
    weights = np.random.default_rng(1).random((2, 4, 9), np.float32)
    weights[0, :, 3:] = 0
    inputs, targets, *_ = batch_of(windows.reshape(8, 10))
    logits = logits_of(model, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets, int))
    hits = jnp.argmax(logits, -1) == targets
    for scale in (1.0, 7.0):
        after, metrics = step(state, batch_of(windows, weights=scale * weights))
        for found, values in ((metrics.loss, losses), (metrics.score, hits)):
            expected = np.average(values, weights=weights.reshape(8, 9))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        other = windows.copy()
        other[0, :, 4:] += 1  # targets of weight 0, and inputs after the last of another weight
        chex.assert_trees_all_close(
            step(state, batch_of(other, weights=scale * weights))[0].params, after.params, rtol=1e-6
        )
    ones = np.ones((2, 4, 9), np.float32)
    _, weighted = step(state, batch_of(windows, weights=ones))
    _, plain_metrics = step(state, batch_of(windows))
    chex.assert_trees_all_close(weighted, plain_metrics, rtol=1e-5)


@pytest.mark.parametrize("metric", [BITS_PER_BYTE, ACCURACY])
def test_evaluation_over_weights(model: LanguageModel, metric: Metric):
    windows = windows_of((2, 2, 11))
    weights = np.random.default_rng(1).random((2, 2, 10), np.float32)
    batches = [batch_of(windows[i : i + 1], weights=weights[i : i + 1]) for i in range(2)]
    where = for_rows(2)
    evaluate = make_evaluate(nnx.graphdef(model), batches, where, metric, stateful=False)
    inputs, targets, *_ = batch_of(windows.reshape(4, 11))
    logits = logits_of(model, inputs)
    values = jnp.argmax(logits, -1) == targets
    if metric is BITS_PER_BYTE:
        targets = jnp.asarray(targets, int)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, targets) / np.log(2)
    expected = np.average(values, weights=weights.reshape(4, 10))
    np.testing.assert_allclose(evaluate(nnx.state(model, nnx.Param)), expected, rtol=1e-5)


def test_a_step_whose_weights_are_all_zero_changes_nothing(scored: tuple[Any, TrainState]):
    step, state = scored
    weights = np.zeros((2, 4, 9), np.float32)
    after, metrics = step(state, batch_of(windows_of((2, 4, 10)), weights=weights))
    assert not np.isfinite(metrics.loss)
    assert (after.updates, after.skipped) == (0, 1)
    chex.assert_trees_all_equal(after.params, state.params)


@pytest.mark.parametrize("stateful", [False, True])
def test_evaluation_is_mean_bits_per_byte(model: LanguageModel, stateful: bool):
    long = windows_of((1, 2, 21))
    first, second = long[..., :11], long[..., 10:]
    batches = [batch_of(first), batch_of(second, restart=False)]
    evaluate = make_evaluate(
        nnx.graphdef(model), batches, for_rows(2), BITS_PER_BYTE, stateful=stateful
    )
    if stateful:
        expected, _ = loss_of(model, long[0])
    else:
        expected = sum(loss_of(model, x[0])[0] for x in (first, second)) / 2
    np.testing.assert_allclose(
        evaluate(nnx.state(model, nnx.Param)), expected / np.log(2), rtol=1e-5
    )


@pytest.mark.parametrize("stateful", [False, True])
def test_attention_remembers_the_window_before(stateful: bool):
    """Stateful, a token sees as many tokens as a window has, across windows; else its own."""
    layers = (AttentionConfig(n_heads=2, head_dim=8), LSTMConfig(width=8))
    model = LanguageModel(LMConfig(dim=16, depth=2, layers=layers), rngs=nnx.Rngs(0))
    optimizer = make_optimizer(plain(), steps=20)
    carry_shape = (1, 3) if stateful else None
    step = make_train_step(nnx.graphdef(model), optimizer, 1.0, BITS_PER_BYTE)
    state = init_state(model, optimizer, carry_shape, context=10)
    long = windows_of((1, 3, 21))
    first, second = long[..., :11], long[..., 10:]
    step = jax.jit(step)
    state, _ = step(state, batch_of(first))
    weights = nnx.state(model, nnx.Param)
    _, metrics = step(state._replace(params=weights), batch_of(second, restart=False))
    start, expected = model.init_state(3, 10) if stateful else None, []
    for windows in (first, second):
        loss, end = loss_of(model, windows[0], start)
        start = end if stateful else None
        expected.append(float(loss))
    np.testing.assert_allclose(metrics.loss, expected[1], rtol=1e-5)
    # A token of the second window then sees some of the first.
    alone, _ = loss_of(model, second[0])
    assert (abs(float(alone) - expected[1]) > 1e-5) == stateful
    evaluate = make_evaluate(
        nnx.graphdef(model),
        [batch_of(first), batch_of(second)],
        for_rows(3),
        BITS_PER_BYTE,
        stateful=stateful,
    )
    np.testing.assert_allclose(evaluate(weights), np.mean(expected) / np.log(2), rtol=1e-5)


def test_schedules():
    config = plain(learning_rate=1.0, warmup_steps=10, final_lr_fraction=0.1)
    cosine: Any = make_optimizer(config, 100).schedule
    assert 0 < cosine(0) < 0.2
    np.testing.assert_allclose([cosine(10), cosine(100), cosine(500)], [1, 0.1, 0.1], rtol=1e-5)
    config = plain(optimizer="schedule_free", learning_rate=1.0, warmup_steps=0)
    constant: Any = make_optimizer(config, 100).schedule
    np.testing.assert_allclose([constant(1), constant(99)], [1, 1])
