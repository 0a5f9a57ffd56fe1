"""A small model's batches, placement and optimizer, for tests of the training step."""

import dataclasses
from typing import Any

import numpy as np

from experiments.harness.config import OptimizerConfig
from experiments.harness.mesh import Placement, placement
from experiments.tasks.base import Batch
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
