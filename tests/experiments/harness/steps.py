"""A small model's batches, placement and optimizer, for tests of the training step."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from e88_jax import LanguageModel, LMConfig
from experiments.harness.config import OptimizerConfig
from experiments.harness.mesh import Placement, placement
from experiments.harness.step import make_gradient
from experiments.tasks.base import Batch
from experiments.tasks.bytes import BITS_PER_BYTE
from tests.reference.configs import lm_config

CONFIG = lm_config(dim=16, n_heads=2, n_state=4)


def for_rows(rows: int, mesh: str = "auto") -> Placement:
    return placement(mesh, rows, CONFIG)


def windows_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def batch_of(windows: np.ndarray, restart: bool = True, weights: Any = None) -> Batch:
    """Each token of a window but the first is the target of the one before."""
    return Batch(windows[..., :-1], windows[..., 1:], weights, np.bool_(restart))


def plain(**flags: object) -> OptimizerConfig:
    return dataclasses.replace(OptimizerConfig(warmup_steps=2), **flags)


def gradient_of(config: LMConfig, mesh: str, windows: np.ndarray) -> Any:
    """Loss, score and gradient of the step on windows `[passes, rows, T + 1]`, on the host."""
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    where, params = placement(mesh, windows.shape[1], config), nnx.state(model, nnx.Param)
    params = jax.device_put(params, where.by_name(params))
    gradient = jax.jit(make_gradient(nnx.graphdef(model), BITS_PER_BYTE, where))
    means, _ = gradient(params, where.put(batch_of(windows))._replace(restart=None), None)
    return jax.device_get(means)
