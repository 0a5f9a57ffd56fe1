"""One training step and one evaluation, as compiled functions of explicit state."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from e88_jax.model import E88LM, LMState

from .data import Batch
from .devices import Placement
from .optimizer import Optimizer, Params

BITS_PER_NAT = 1.4426950408889634
"""1 / ln 2."""

GPU_OPTIONS: dict[str, str | bool] = {
    # XLA moves what joins the gradients of a product's parts into a product of its own making, then
    # finds cuBLAS faster, and is left with copies.
    "xla_gpu_enable_triton_gemm": False,
    # Graphs of kernels are filled in anew for each step, as its arrays move.
    "xla_gpu_enable_command_buffer": "",
    # XLA would join a layer's two products where they are small, and copy the parts.
    "xla_gpu_dot_merger_threshold_mb": "0",
}
"""XLA's options for the training step on a GPU; flags of the same name in `XLA_FLAGS` win. What
each gains is in `benchmarks/README.md`."""


class TrainState(NamedTuple):
    """All that a step reads and writes; all that a checkpoint holds of the weights."""

    params: Params
    optimizer: Any
    carry: LMState | None
    """State of each row at the end of its window, `[passes, rows, ...]`; None unless stateful."""
    updates: Array
    """Updates made."""
    skipped: Array
    """Steps that changed nothing, because loss or gradient was not finite."""
    skipped_in_a_row: Array


class StepMetrics(NamedTuple):
    """Numbers of one step, on the device until someone asks."""

    loss: Array
    """Mean nats per byte."""
    grad_norm: Array
    """Global norm of the gradient before clipping."""
    learning_rate: Array
    skipped: Array
    skipped_in_a_row: Array


def next_byte_loss(
    model: E88LM, windows: Array, state: LMState | None = None
) -> tuple[Array, LMState]:
    """Mean cross-entropy in nats per byte of windows `[B, T + 1]`, and the state at their end."""
    tokens = windows.astype(jnp.int32)
    logits, state = model(tokens[:, :-1], state)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), state


def init_state(
    model: E88LM, optimizer: Optimizer, carry_shape: tuple[int, int] | None
) -> TrainState:
    """The state before the first step; `carry_shape` is (passes, rows) of a stateful run."""
    params = nnx.state(model, nnx.Param)
    carry = None
    if carry_shape is not None:
        passes, rows = carry_shape
        carry = jax.tree.map(
            lambda x: jnp.zeros((passes, *x.shape), x.dtype), model.init_state(rows)
        )
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(params, optimizer.transform.init(params), carry, *zeros)


def place(state: TrainState, where: Placement) -> TrainState:
    """The state on the devices of `where`: what is carried divided by row, the rest everywhere."""
    carry = jax.device_put(state.carry, where.by_row)
    return jax.device_put(state._replace(carry=None), where.everywhere)._replace(carry=carry)


def make_train_step(
    graphdef: nnx.GraphDef[E88LM], optimizer: Optimizer, clip_norm: float
) -> Callable[[TrainState, Array, Array], tuple[TrainState, StepMetrics]]:
    """The function `(state, windows, restart) -> (state, metrics)`, to be compiled.

    `windows` is `[passes, rows, T + 1]`: the gradients of the passes are averaged. `restart` (bool)
    starts the rows of a stateful run from zero states. A step whose loss or gradient is not finite
    leaves weights, optimiser and carried state as they were.
    """
    clip = optax.clip_by_global_norm(clip_norm)

    def gradient(params: Params, windows: Array, carry: LMState | None) -> Any:
        def loss_of(params: Params) -> tuple[Array, LMState | None]:
            loss, end = next_byte_loss(nnx.merge(graphdef, params), windows, carry)
            return loss, None if carry is None else end

        (loss, carry), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, grads, carry

    def step(state: TrainState, windows: Array, restart: Array) -> tuple[TrainState, StepMetrics]:
        carry = jax.tree.map(lambda x: jnp.where(restart, jnp.zeros_like(x), x), state.carry)

        def accumulate(total: Any, one_pass: Any) -> Any:
            loss, grads, end = gradient(state.params, *one_pass)
            return jax.tree.map(jnp.add, total, (loss, grads)), end

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        total, carry = lax.scan(accumulate, zeros, (windows, carry))
        loss, grads = jax.tree.map(lambda x: x / windows.shape[0], total)
        grad_norm = optax.tree.norm(grads)
        clipped, _ = clip.update(grads, optax.EmptyState())
        updates, opt_state = optimizer.transform.update(clipped, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state, carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, carry),
            (state.params, state.optimizer, state.carry),
        )
        new_state = TrainState(
            params,
            opt_state,
            carry,
            updates=state.updates + finite.astype(jnp.int32),
            skipped=state.skipped + (~finite).astype(jnp.int32),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        rate = jnp.asarray(optimizer.schedule(state.updates), jnp.float32)
        metrics = StepMetrics(loss, grad_norm, rate, new_state.skipped, new_state.skipped_in_a_row)
        return new_state, metrics

    return step


def compile_train_step(
    graphdef: nnx.GraphDef[E88LM],
    optimizer: Optimizer,
    clip_norm: float,
    state: TrainState,
    windows: Array,
) -> jax.stages.Compiled:
    """`make_train_step` compiled for arguments like these, which are where they are to stay.

    Each call consumes its `state`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state), state.updates.sharding
    step = jax.jit(
        make_train_step(graphdef, optimizer, clip_norm), donate_argnums=0, out_shardings=shardings
    )
    return step.lower(state, windows, np.bool_(True)).compile(compiler_options=xla_options())


def xla_options() -> dict[str, str | bool]:
    """Those of `GPU_OPTIONS` that are for the device at hand and not the user's to choose."""
    if jax.default_backend() != "gpu":
        return {}
    chosen = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in GPU_OPTIONS.items() if f"--{name}" not in chosen}


def make_evaluate(
    graphdef: nnx.GraphDef[E88LM], batches: list[Batch], where: Placement, *, stateful: bool
) -> Callable[[Params], float]:
    """The function from weights to bits per byte on `batches`, state carried if `stateful`."""
    rows = batches[0].windows.shape[1]

    @jax.jit
    def evaluate(params: Params, windows: Array) -> Array:
        model = nnx.merge(graphdef, params)

        def one(state: LMState, windows: Array) -> tuple[LMState, Array]:
            loss, end = next_byte_loss(model, windows, state)
            return (end if stateful else state), loss

        return jnp.mean(lax.scan(one, model.init_state(rows), windows)[1])

    windows = where.put_rows(np.concatenate([batch.windows for batch in batches]))
    return lambda params: float(evaluate(params, windows)) * BITS_PER_NAT
