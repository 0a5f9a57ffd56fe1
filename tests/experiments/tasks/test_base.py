"""Metrics: which value is better, and what they are the mean of."""

import math

import jax.numpy as jnp
import pytest

from experiments.tasks.base import Metric

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
