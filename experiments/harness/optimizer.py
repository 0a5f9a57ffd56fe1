"""Optimizers by name, each with its learning-rate schedule and the weights it evaluates with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from e88_jax.optim import muon_dimensions, weight_decay_mask

from .config import OptimizerConfig

Params = Any
"""A tree of parameters, such as `nnx.state(model, nnx.Param)`."""
OptimizerState = Any
"""State of an optax transformation."""


class Optimizer(NamedTuple):
    """An Optax transformation with its schedule and its weights for evaluation."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    """Learning rate by number of updates."""
    eval_params: Callable[[OptimizerState, Params], Params]
    """Weights to evaluate and sample with, from optimizer state and trained weights."""


def _muon_or_adamw(params: Params) -> Any:
    """Muon for the matmuls' weights; embedding, convolutions and vectors stay with AdamW."""
    dimensions = muon_dimensions(params)
    is_leaf = lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(lambda x: "adamw" if x is None else "muon", dimensions, is_leaf=is_leaf)


def make_optimizer(
    config: OptimizerConfig, steps: int, rate: jax.Array | float | None = None
) -> Optimizer:
    """The optimizer for a run of `steps` updates. Clipping is the training step's.

    Args:
        config: the optimizer's flags.
        steps: length of the schedule.
        rate: peak learning rate, which may be traced; None for `config.learning_rate`.
    """
    schedule = _schedule(config, steps, config.learning_rate if rate is None else rate)
    if config.optimizer == "schedule_free":
        # optax.contrib.schedule_free_adamw, with a mask for the weight decay.
        base = optax.chain(
            optax.scale_by_rms(
                decay=config.beta2, eps=1e-8, eps_in_sqrt=False, bias_correction=True
            ),
            optax.add_decayed_weights(config.weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
        transform = contrib.schedule_free(base, learning_rate=schedule, b1=config.beta1)
        return Optimizer(transform, schedule, contrib.schedule_free_eval_params)

    transform = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=weight_decay_mask,
    )
    if config.optimizer == "muon":
        # Updates as large as AdamW's, so that one rate suits both (arXiv:2502.16982).
        muon = contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        transform = optax.partition({"muon": muon, "adamw": transform}, _muon_or_adamw)
    return Optimizer(transform, schedule, lambda _state, params: params)


def _schedule(config: OptimizerConfig, steps: int, rate: jax.Array | float) -> optax.Schedule:
    """The learning rate by number of updates: `rate` times a warm-up and a constant or a cosine."""
    warmup = config.warmup_steps
    if config.optimizer == "schedule_free":
        relative = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
    else:
        relative = optax.warmup_cosine_decay_schedule(
            1 / (warmup + 1), 1.0, warmup, max(steps, warmup + 1), config.final_lr_fraction
        )
    return lambda count: rate * relative(count)
