"""Metrics: which value is better, and what they are the mean of; rows of a batch."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.base import Batch, Metric, rows_of

LOWER = Metric("bits_per_byte", "bits per byte", "lower", scale=2.0)
HIGHER = Metric("accuracy", "of targets", "higher", per_target=lambda logits, _: jnp.sum(logits))


@pytest.mark.parametrize(("metric", "better", "worse"), [(LOWER, 1.0, 2.0), (HIGHER, 2.0, 1.0)])
def test_a_value_improves_on_the_best(metric: Metric, better: float, worse: float) -> None:
    assert metric.improves(better, worse)
    assert not metric.improves(worse, better)
    assert not metric.improves(better, better)
    assert metric.improves(worse, None)
    for best in (None, worse):
        for value in (math.nan, math.inf, -math.inf):
            assert not metric.improves(value, best)


def test_a_metric_is_the_scaled_mean_of_the_loss_or_of_its_own_values() -> None:
    means = {"loss": 1.5, "grad_norm": 3.0, "score": 0.25}
    assert (LOWER.of_means(means), HIGHER.of_means(means)) == (3.0, 0.25)


@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_a_task_that_reads_whole_batches(dense: bool) -> None:
    tokens = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    weights, positions = (None, None) if dense else (tokens + 2.0, tokens)
    whole = Batch(tokens, tokens + 1, weights, dense, positions)
    task: Any = {7: whole}
    rows = rows_of(task, 7, slice(1, 3))
    assert rows.restart == dense
    for part, x in zip(rows, whole, strict=True):
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(part, x[:, 1:3])
        else:
            assert part is x
