"""Each optimizer against its equations in NumPy, on parameters with a model's names."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness.config import OptimizerConfig
from experiments.harness.optimizer import Optimizer, make_optimizer

STEPS = 3
CONFIG = OptimizerConfig(
    learning_rate=0.02,
    warmup_steps=1,
    final_lr_fraction=0.25,
    weight_decay=0.3,
    beta1=0.7,
    beta2=0.8,
)
MATRIX, WIDE, TALL = "mixer.read.kernel", "mixer.inputs.qkv.kernel", "mixer.heads.projection.kernel"
IN_AXES = {WIDE: 1, TALL: 2}
"""Axes that a matmul sums over, of kernels that say so; those of two axes need not."""
NOT_MUONS = {
    "embed.embedding": (6, 3),
    "mixer.conv.taps": (4, 2, 5),
    "mixer.einsum.kernel": (2, 3, 4),
    "mixer.decay.A_log": (2,),
}
SHAPES = {MATRIX: (8, 8), WIDE: (8, 4, 100), TALL: (4, 100, 8), **NOT_MUONS}
DECAYED = {name for name in SHAPES if name.endswith(("kernel", "embedding", "taps"))}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """With paths as those of a model's parameters."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split(".")
        inside = result
        for folder in folders:
            inside = inside.setdefault(folder, {})
        axes: Any = {"n_in_axes": IN_AXES[name]} if name in IN_AXES else {}
        inside[last] = nnx.Param(jnp.asarray(value), **axes)
    return result


def flat(values: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(values, nnx.Variable):
        return {prefix.rstrip("."): np.asarray(values[...])}
    parts = [flat(value, f"{prefix}{name}.") for name, value in values.items()]
    return {name: value for part in parts for name, value in part.items()}


@functools.cache
def run(config: OptimizerConfig) -> tuple[list[dict[str, np.ndarray]], Optimizer, Any]:
    """The parameters before the first of `STEPS` steps and after each; the last state."""
    optimizer = make_optimizer(config, STEPS)
    update = jax.jit(optimizer.transform.update)
    params = nested(tree(0))
    state = optimizer.transform.init(params)
    seen = [flat(params)]
    for step in range(STEPS):
        updates, state = update(nested(tree(1 + step)), state, params)
        params = jax.tree.map(lambda param, update: param + update, params, updates)
        seen.append(flat(params))
    return seen, optimizer, state


def rates(config: OptimizerConfig) -> list[float]:
    """Linear from rate / (warmup + 1), then a cosine, by number of updates made."""
    peak, warmup, end = config.learning_rate, config.warmup_steps, config.final_lr_fraction
    first = peak / (warmup + 1)
    if config.optimizer == "schedule_free":
        end = 1.0
    return [
        first + (peak - first) * step / warmup
        if step < warmup
        else peak * (end + (1 - end) * (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup))) / 2)
        for step in range(STEPS + 1)
    ]


def test_adamw() -> None:
    seen, optimizer, _ = run(CONFIG)
    schedule: Any = optimizer.schedule
    found = [float(schedule(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(found, rates(CONFIG), rtol=1e-6)
    for name, param in tree(0).items():
        mean = square = 0.0
        for step in range(STEPS):
            grad = tree(1 + step)[name]
            mean = CONFIG.beta1 * mean + (1 - CONFIG.beta1) * grad
            square = CONFIG.beta2 * square + (1 - CONFIG.beta2) * grad**2
            direction = mean / (1 - CONFIG.beta1 ** (step + 1))
            direction = direction / (np.sqrt(square / (1 - CONFIG.beta2 ** (step + 1))) + 1e-8)
            decay = CONFIG.weight_decay * param if name in DECAYED else 0
            param = param - rates(CONFIG)[step] * (direction + decay)
            np.testing.assert_allclose(seen[step + 1][name], param, rtol=1e-4, atol=1e-6)
    assert flat(optimizer.eval_params(None, nested(seen[-1]))).keys() == SHAPES.keys()


def test_schedule_free() -> None:
    """arXiv:2405.15682: z steps, x is their mean by squared rate, y between them is trained."""
    config = OptimizerConfig(**{**vars(CONFIG), "optimizer": "schedule_free"})
    seen, optimizer, state = run(config)
    weights = flat(optimizer.eval_params(state, nested(seen[-1])))
    expected = rates(config)
    for name, y in tree(0).items():
        x = z = y
        square, total = 0.0, 0.0
        for step in range(STEPS):
            grad = tree(1 + step)[name]
            square = config.beta2 * square + (1 - config.beta2) * grad**2
            direction = grad / (np.sqrt(square / (1 - config.beta2 ** (step + 1))) + 1e-8)
            decay = config.weight_decay * y if name in DECAYED else 0
            z = z - expected[step] * (direction + decay)
            share = expected[step + 1] ** 2  # the mean counts its steps from 1
            total += share
            x = (1 - share / total) * x + share / total * z
            y = config.beta1 * x + (1 - config.beta1) * z
            np.testing.assert_allclose(seen[step + 1][name], y, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(weights[name], x, rtol=1e-3, atol=1e-5)


def test_muon() -> None:
    """Weights of matmuls get orthogonal updates of AdamW's size; all else is AdamW's."""
    config = OptimizerConfig(**{**vars(CONFIG), "optimizer": "muon"})
    seen, _, _ = run(config)
    adamw, _, _ = run(CONFIG)
    for name in NOT_MUONS:
        np.testing.assert_array_equal(seen[-1][name], adamw[-1][name])
    rate = rates(config)[0]
    for name in (MATRIX, WIDE, TALL):
        update = seen[1][name] - seen[0][name] * (1 - rate * config.weight_decay)
        # Five Newton-Schulz iterations bring singular values to 0.7 to 1.2 of their mean.
        n_in = int(np.prod(update.shape[: IN_AXES.get(name, 1)]))
        singular = np.linalg.svd(update.reshape(n_in, -1), compute_uv=False)
        assert singular.max() < 2 * singular.min()
        assert 0.14 < np.sqrt(np.mean(update**2)) / rate < 0.25  # AdamW's RMS is about 0.2


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_shorter_than_its_warm_up(steps: int) -> None:
    schedule = make_optimizer(CONFIG, steps).schedule
    np.testing.assert_allclose(schedule(1), CONFIG.learning_rate, rtol=1e-6)
    assert all(np.isfinite(schedule(step)) for step in range(5))
