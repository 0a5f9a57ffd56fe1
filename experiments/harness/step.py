"""One training step and one evaluation, as compiled functions of explicit state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from e88_jax.model import LanguageModel, LMState
from e88_jax.xla import xla_options
from experiments.cli.errors import UsageError
from experiments.tasks.base import Batch, Metric

from .mesh import Placement, alone
from .optimizer import Optimizer, OptimizerState, Params


class TrainState(NamedTuple):
    """State of training, read and written by a step and saved in checkpoints."""

    params: Params
    optimizer: OptimizerState
    carry: LMState | None
    """Model state after each row's window, `[passes, rows, ...]`; None unless stateful."""
    updates: Array
    """Count of updates."""
    skipped: Array
    """Count of steps without effect, as their loss or gradient was not finite."""
    skipped_in_a_row: Array


class StepMetrics(NamedTuple):
    """Numbers of one step, on the device."""

    loss: Array
    """Weighted mean of nats per target."""
    grad_norm: Array
    """Global norm of the gradient before clipping."""
    learning_rate: Array
    skipped: Array
    skipped_in_a_row: Array
    score: Array | None = None
    """Weighted mean of the metric's values per target; None for a metric that is the loss."""


def mean_loss(
    model: LanguageModel, batch: Batch, state: LMState | None = None, metric: Metric | None = None
) -> tuple[Array, tuple[Array | None, LMState]]:
    """Loss of one pass, `[rows, T]`, with the metric's mean and the state at its end.

    The loss is the mean cross-entropy in nats, weighted as given: `relative` makes it a weighted
    mean. The metric's mean is None for a metric that is the loss.
    """
    inputs = jnp.asarray(batch.inputs, jnp.int32)
    logits, state = model(inputs, state, positions=cast("Array | None", batch.positions))
    targets = jnp.asarray(batch.targets, jnp.int32)

    def mean(values: Array) -> Array:
        return jnp.mean(values if batch.weights is None else batch.weights * values)

    loss = mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    if metric is None or metric.per_target is None:
        return loss, (None, state)
    return loss, (mean(metric.per_target(lax.stop_gradient(logits), targets)), state)


def relative(batch: Batch) -> Batch:
    """The batch with weights whose mean is 1."""
    if batch.weights is None:
        return batch
    return batch._replace(weights=jnp.asarray(batch.weights) / jnp.mean(batch.weights))


def init_state(
    model: LanguageModel,
    optimizer: Optimizer,
    carry_shape: tuple[int, int] | None,
    context: int | None = None,
) -> TrainState:
    """The state before the first step; `carry_shape` is (passes, rows) of a stateful run, and
    `context` the tokens that attention without a window remembers in it."""
    params = nnx.state(model, nnx.Param)
    carry = None
    if carry_shape is not None:
        passes, rows = carry_shape
        carry = jax.tree.map(
            lambda x: jnp.zeros((passes, *x.shape), x.dtype), model.init_state(rows, context)
        )
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(params, optimizer.transform.init(params), carry, *zeros)


def shardings_of(state: TrainState, where: Placement) -> TrainState:
    """The sharding of each array: weights and optimizer state by the names of their axes, the carry
    by row and head, the rest replicated.

    Raises:
        UsageError: heads are divided, and a layer's states do not name their axes.
    """
    for i, layer in enumerate(state.carry or ()):
        if where.sizes.heads > 1 and not hasattr(layer, "AXES"):
            raise UsageError(
                f"--stateful with heads={where.sizes.heads} must know which axes of a state are "
                f"heads: {type(layer).__name__}, the state of layer {i}, has no AXES."
            )
    weights = where.by_name(state.params), where.by_name(state.optimizer)
    scalars: list[Any] = [where.everywhere] * 3
    return TrainState(*weights, where.of_rows(state.carry), *scalars)


def shapes_of(make: Callable[[], TrainState], where: Placement) -> TrainState:
    """Shapes, dtypes and shardings of the state that `make` returns."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
        shapes,
        shardings_of(shapes, where),
    )


def make_sharded(make: Callable[[], TrainState], like: TrainState) -> TrainState:
    """The state that `make` returns, by one program in which each device makes its part of it."""
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))()


def make_train_step(
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: Optimizer,
    clip_norm: float,
    metric: Metric,
    where: Placement | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function `(state, batch) -> (state, metrics)`, to be compiled.

    The gradients of the passes are averaged. `batch.restart` starts the rows of a stateful run from
    zero states. A step whose loss or gradient is not finite leaves weights, optimizer and carried
    state as they were.

    Args:
        graphdef: the model.
        optimizer: of its weights.
        clip_norm: largest global norm of the gradient.
        metric: of the run.
        where: devices that the arrays are divided over; None for one device.
    """
    clip = optax.clip_by_global_norm(clip_norm)
    gradient = make_gradient(graphdef, metric, where or alone())

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        carry = jax.tree.map(lambda x: jnp.where(batch.restart, jnp.zeros_like(x), x), state.carry)
        passes = relative(batch)._replace(restart=None)
        (loss, score, grads), carry = gradient(state.params, passes, carry)
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
        skipped = new_state.skipped, new_state.skipped_in_a_row
        return new_state, StepMetrics(loss, grad_norm, rate, *skipped, score)

    return step


def make_gradient(
    graphdef: nnx.GraphDef[LanguageModel], metric: Metric, where: Placement
) -> Callable[[Params, Batch, LMState | None], tuple[tuple[Array, Array | None, Params], Any]]:
    """The function `(params, passes, carry) -> ((loss, score, gradient), carry)`, means of passes.

    Devices exchange weights and gradients; those of the axis `heads` also the output of each layer
    and the gradient of its input. Weights that are divided over `fsdp` are gathered in each pass,
    and their gradient is summed to the parts there; other sums of gradients are taken once, after
    all passes. Gradients of the weights of matmuls are summed in the compute dtype, to
    which the matmuls have rounded them, the mean of several passes and all others in float32.
    """

    def of_rows(params: Params, passes: Batch, carry: LMState | None) -> Any:
        dtype = nnx.merge(graphdef, params).dtype
        n_passes = passes.inputs.shape[0]

        def accumulate(total: Any, one: tuple[Batch, LMState | None]) -> Any:
            one_pass, carry = one

            def loss_of(params: Params) -> Any:
                model = where.merge(graphdef, params)
                loss, (score, end) = mean_loss(model, one_pass, carry, metric)
                return loss, (score, None if carry is None else end)

            (loss, (score, end)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            return jax.tree.map(jnp.add, total, (loss, score, grads)), end

        zero = jnp.zeros(())
        zeros = zero, None if metric.per_target is None else zero
        zeros = *zeros, jax.tree.map(jnp.zeros_like, params)
        total, carry = lax.scan(accumulate, zeros, (passes, carry))
        loss, score, grads = jax.tree.map(lambda x: x / n_passes, total)
        grads = where.mean_gradient(grads, dtype if n_passes == 1 else None)
        return (where.mean(loss), where.mean(score), grads), carry

    def gradient(params: Params, passes: Batch, carry: LMState | None) -> Any:
        means = where.everywhere, where.everywhere, where.by_name(params)
        results = means, where.of_rows(carry)
        return where.map_rows(of_rows, params, passes, carry, results=results)

    return gradient


def jit_train_step(
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: Optimizer,
    clip_norm: float,
    metric: Metric,
    state: TrainState,
) -> Any:
    """`make_train_step` by `jax.jit` for states with these shardings; a call consumes its
    `state`."""
    everywhere: Any = state.updates.sharding
    where = Placement(everywhere.mesh)
    sizes, gathered_bytes = where.sizes, None
    if sizes.fsdp > 1:
        gathered_bytes = _layer_bytes(graphdef, state.params) // sizes.heads
    divides_rows = sizes.n_parts > 1 or sizes.heads == 1
    return jax.jit(
        make_train_step(graphdef, optimizer, clip_norm, metric, where),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), everywhere),
        compiler_options=xla_options(gathered_bytes=gathered_bytes, divides_rows=divides_rows),
    )


def _layer_bytes(graphdef: nnx.GraphDef[LanguageModel], params: Params) -> int:
    """Bytes of the weights of the largest layer in the compute dtype."""
    model = nnx.merge(graphdef, params)
    layers = [nnx.state(block, nnx.Param) for block in model.blocks]
    sizes = [sum(x.size for x in jax.tree.leaves(layer)) for layer in layers]
    return max(sizes) * model.dtype.itemsize


def compile_train_step(
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: Optimizer,
    clip_norm: float,
    metric: Metric,
    state: TrainState,
    batch: Batch,
) -> jax.stages.Compiled:
    """`jit_train_step` compiled for arguments of these shapes and shardings."""
    step = jit_train_step(graphdef, optimizer, clip_norm, metric, state)
    return step.lower(state, batch).compile()


def make_evaluate(
    graphdef: nnx.GraphDef[LanguageModel],
    batches: Sequence[Batch],
    where: Placement,
    metric: Metric,
    *,
    stateful: bool,
) -> Callable[[Params], float]:
    """The function from weights to the metric on `batches`; the state is carried if `stateful`, and
    attention without a window then remembers the tokens of one window of the data."""

    def of_rows(params: Params, passes: Batch) -> Array:
        model = where.merge(graphdef, params)
        _, rows, seq_len = passes.inputs.shape

        def one(state: LMState | None, batch: Batch) -> tuple[LMState | None, Array]:
            loss, (score, end) = mean_loss(model, batch, state, metric)
            return (end if stateful else None), loss if score is None else score

        start = model.init_state(rows, seq_len) if stateful else None
        return where.mean(jnp.mean(lax.scan(one, start, passes)[1]))

    @jax.jit
    def evaluate(params: Params, batch: Batch) -> Array:
        passes = relative(batch)._replace(restart=None)
        return where.map_rows(of_rows, params, passes, results=where.everywhere)

    arrays = [batch._replace(restart=None) for batch in batches]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *arrays)
    batch = where.put(joined._replace(restart=True))
    return lambda params: float(evaluate(params, batch)) * metric.scale
