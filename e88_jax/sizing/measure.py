"""Timing of a model's training step on the GPU of this machine, for `--compare --measure`.

The step is plain: one jitted function with AdamW. `benchmarks/train_step.py` times the trainer's.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]
from flax import nnx
from jax import Array

from e88_jax.config import LMConfig
from e88_jax.model import LanguageModel
from e88_jax.typed import Variables, jit, params_of, shapes_of, split
from e88_jax.xla import xla_options
from pallas_kernels import target

UNTIMED_STEPS = 3
STEPS = 5
"""Steps timed, after `UNTIMED_STEPS`; their median counts."""


def require_gpu() -> str:
    """The name of the GPU.

    Raises:
        ValueError: JAX has none.
    """
    device = target.current()
    if device.platform != "gpu":
        raise ValueError(f"--measure times training steps on a GPU, got {device.platform}.")
    return device.name


def tokens_per_second(
    config: LMConfig, batch: int, length: int, *, steps: int = STEPS
) -> float | None:
    """Tokens per second of the model's training step, by the median of `steps` steps.

    Random tokens, AdamW with optax's defaults. A step is queued while the one before it runs.

    Args:
        config: the model.
        batch: sequences of a step.
        length: tokens of each.
        steps: to time.

    Returns:
        None if the device has too little memory. What the model took is free again.
    """
    try:
        seconds = _step_seconds(config, batch, length, steps)
    except RuntimeError as error:  # JAX's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = None
    gc.collect()  # modules refer to each other in circles
    jax.clear_caches()
    return None if seconds is None else batch * length / statistics.median(seconds)


def _step_seconds(config: LMConfig, batch: int, length: int, steps: int) -> list[float]:
    optimizer: Any = optax.adamw(1e-4)

    def new() -> LanguageModel:
        return LanguageModel(config, rngs=nnx.Rngs(0))

    def start() -> Any:
        params = params_of(new())
        return params, optimizer.init(params)

    graphdef, _ = split(shapes_of(new))

    def loss_of(params: Variables, tokens: Array) -> Array:
        logits, _ = nnx.merge(graphdef, params)(tokens[:, :-1])
        losses: Any = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    grad: Callable[..., tuple[Array, Variables]] = jax.value_and_grad(loss_of)  # pyright: ignore

    def step(state: Any, tokens: Array) -> tuple[Any, Array]:
        params, moments = state
        loss, grads = grad(params, tokens)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    key, shape = jax.random.key(0), (batch, length + 1)
    tokens = jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32)
    run = jit(step, donate_argnums=0, compiler_options=xla_options())
    state = jit(start)()
    ends: list[float] = []
    queue: list[Array] = []
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        for _ in range(UNTIMED_STEPS + steps):
            state, loss = run(state, tokens)
            queue.append(loss)
            if len(queue) > 1:
                queue.pop(0).block_until_ready()
                ends.append(time.perf_counter())
    queue.pop().block_until_ready()
    ends.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(ends[UNTIMED_STEPS - 1 :])]
