"""The kernels as functions of the op's arrays, which `jax.vmap` and sharded programs can take.

Rows of the batch and heads are independent: a mapped axis is folded into the batch, and a shard of
the batch or of the heads runs where it lies. No function here can be differentiated; `vjp.py` joins
the recurrence's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import tuning
from pallas_kernels.backward import backward
from pallas_kernels.forward import Kept, forward
from pallas_kernels.geometry import Geometry
from pallas_kernels.operands import (
    Inputs,
    cut,
    prepare,
    prepare_states,
    prepare_values,
    resized,
    row_major,
)

ONCE = (
    "implementation='mosaic_gpu' differentiates once; use implementation='scan' for derivatives of "
    "higher order."
)

# The names of the axes of what the calls take and give.
INPUTS: Any = Inputs._make(["b t h n", "b t h n", "b t h v", "b t h", "b t h", "b t", "b t"])
STATE = "b h n v"
# Keys and columns with their padding: to cut them and pad them again takes time. Heads without, as
# they may be sharded.
KEPT: Any = Kept._make(["b h checkpoints values keys", "b t h values"])


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call of the op fixes.

    Geometries that are not given are chosen for the shapes at hand; `interpret` is None or the
    interpreter's parameters.
    """

    linear_state: bool
    forward_geometry: Geometry | None
    backward_geometry: Geometry | None
    interpret: Any


def _geometry(choose: Callable[..., Geometry], x: Inputs, *options: Any) -> Geometry:
    batch, _, heads, n_state = x.q.shape
    h100 = 132
    n_sms = getattr(jax.devices()[0], "core_count", h100)
    return choose(batch, heads, n_state, x.v.shape[-1], n_sms, x.q.dtype, *options)


@functools.cache
def forward_call(
    options: Options, saved_state_interval: int | None, keep_errors: bool
) -> Callable[[Inputs, Array | None], tuple[Array, Array, Any]]:
    """From inputs and the initial state to `out`, the final state, and what is kept, if it is.

    Checkpoint i, in v's dtype, is the state before step `i * saved_state_interval`, a multiple of
    `GROUP`.
    """

    def call(x: Inputs, initial_state: Array | None) -> tuple[Array, Array, Kept | None]:
        geometry = options.forward_geometry or _geometry(tuning.forward_geometry, x)
        if saved_state_interval is not None and geometry.chunk % saved_state_interval:
            chunk = math.gcd(geometry.chunk, saved_state_interval)
            geometry = dataclasses.replace(geometry, chunk=chunk)
        if initial_state is not None:
            initial_state = prepare_states(jnp.swapaxes(initial_state, 2, 3), geometry)
        out, final_state, kept = forward(
            prepare(x, geometry, options.interpret),
            initial_state,
            geometry,
            saved_state_interval,
            keep_errors,
            linear_state=options.linear_state,
            interpret=options.interpret,
        )
        _, time, heads, n_state = x.q.shape
        n_value = x.v.shape[-1]
        if kept is not None:
            errors = None if kept.errors is None else kept.errors[:, :, :heads]
            kept = Kept(kept.checkpoints[:, :heads], errors)
        return (
            cut(out, time, heads, n_value),
            jnp.swapaxes(cut(final_state, heads, n_value, n_state), 2, 3),
            kept,
        )

    def results(x: Inputs, _: Any) -> Any:
        kept = KEPT if keep_errors else KEPT._replace(errors=None)
        return x.v, STATE, None if saved_state_interval is None else kept

    return over_rows(call, (INPUTS, STATE), results, options.interpret is None)


@functools.cache
def backward_call(
    options: Options,
) -> Callable[[Inputs, Array, Array, Array], tuple[Inputs, Array]]:
    """From inputs, checkpoints and the gradients of `out` and the final state to the gradients of
    the inputs and of the initial state. Checkpoints are `GROUP` steps apart, and in place of v the
    inputs have the errors that were kept."""

    def call(
        x: Inputs, checkpoints: Array, d_out: Array, d_final_state: Array
    ) -> tuple[Inputs, Array]:
        has_write_gate = x.write_gate is not None
        n_scalars = sum(row is not None for row in (x.decay, x.write_gate, x.starts, x.live))
        geometry = options.backward_geometry or _geometry(
            tuning.backward_geometry,
            x._replace(v=d_out),
            n_scalars,
            has_write_gate,
        )
        d = backward(
            prepare(x, geometry, options.interpret),
            prepare_values(d_out, geometry, options.interpret),
            prepare_states(jnp.swapaxes(d_final_state, 2, 3), geometry),
            prepare_states(checkpoints, geometry),
            geometry,
            linear_state=options.linear_state,
            interpret=options.interpret,
        )
        _, time, heads, n_state = x.q.shape
        n_value = d_out.shape[-1]

        def total(parts: Array) -> Array:
            return jnp.sum(parts, axis=0, dtype=jnp.float32)

        d_q, d_k = (cut(total(parts), time, heads, n_state) for parts in (d.d_q, d.d_k))
        d_scalars = cut(total(d.d_scalars)[:, :heads], time)  # [B, H, S, T]
        d_decay, *d_write_gate = (
            row_major(jnp.swapaxes(d_scalars[:, :, i], 1, 2)) for i in range(d_scalars.shape[2])
        )
        if x.starts is not None:
            starts = jnp.broadcast_to(x.starts[:, :, None], d_decay.shape)
            d_decay = jnp.where(starts, jnp.zeros_like(d_decay), d_decay)
        d_inputs = Inputs(
            q=d_q.astype(x.q.dtype),
            k=d_k.astype(x.k.dtype),
            v=cut(d.d_v, time, heads, n_value),
            decay=d_decay,
            write_gate=d_write_gate[0] if d_write_gate else None,
            starts=None,
            live=None,
        )
        return d_inputs, jnp.swapaxes(cut(d.d_initial_state, heads, n_value, n_state), 2, 3)

    def results(x: Inputs, *_: Any) -> Any:
        return x._replace(v=INPUTS.v, starts=None, live=None), STATE

    arguments = INPUTS._replace(v=KEPT.errors), KEPT.checkpoints, INPUTS.v, STATE
    return over_rows(call, arguments, results, options.interpret is None)


def over_rows(
    call: Callable[..., Any],
    arguments: Any,
    results: Callable[..., Any],
    partition: bool,
    no_derivative: str = ONCE,
) -> Any:
    """`call` for mapped and sharded arrays.

    Args:
        call: a function of arrays, or trees of them, that may be None.
        arguments: the names of the axes of its arguments, in trees like theirs.
        results: from those of the arguments that are given to those of its results.
        partition: whether it can be sharded.
        no_derivative: the error of whoever differentiates it.
    """
    # The interpreter has side effects, which a partitioned function cannot have.
    call = _fold_mapped(_partitioned(call, arguments, results) if partition else call)
    call = jax.custom_jvp(call)

    @call.defjvp
    def _(*_: Any) -> Any:
        raise NotImplementedError(no_derivative)

    return call


def _fold_mapped(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, under `jax.vmap` with the mapped axis folded into the batch, every array's axis 0."""
    folded = custom_vmap(call)

    @folded.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        def fold(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*jax.tree.map(fold, arguments, tuple(in_batched)))
        results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return folded


def _partitioned(
    call: Callable[..., Any], arguments: Any, results: Callable[..., Any]
) -> Callable[..., Any]:
    """`call`, in sharded programs run by each device on its rows of the batch and its heads."""

    def partitioned(*arrays: Any) -> Any:
        argument_axes = jax.tree.map(
            lambda x, axes: None if x is None else axes,
            arrays,
            arguments,
            is_leaf=lambda x: x is None,
        )
        result_axes = results(*argument_axes)

        def partition(mesh: Any, shapes: Any, result_shapes: Any) -> Any:
            first, names = (jax.tree.leaves(x)[0] for x in (shapes, argument_axes))
            spec = dict(zip(names.split(), first.sharding.spec, strict=True))
            sharded = {name: spec[name] for name in ("b", "h") if name in spec}

            def shardings(axes: Any) -> Any:
                return jax.tree.map(functools.partial(_sharding, mesh, sharded), axes)

            def fitted(x: Array, whole: Any, axes: str) -> Array:
                # A shard's blocks may pad otherwise.
                sizes = zip(axes.split(), x.shape, whole.shape, strict=True)
                return resized(x, tuple(own if a in sharded else all_ for a, own, all_ in sizes))

            def of_shard(*arrays: Any) -> Any:
                return jax.tree.map(fitted, call(*arrays), result_shapes, result_axes)

            return mesh, of_shard, shardings(result_axes), shardings(argument_axes)

        function = custom_partitioning(call)
        function.def_partition(
            partition,
            sharding_rule=" -> ".join(
                ", ".join(jax.tree.leaves(axes)) for axes in (argument_axes, result_axes)
            ),
            need_replication_factors=_others(argument_axes, result_axes),
        )
        if not (axes := _varying(arrays)):
            return function(*arrays)
        made = function(*jax.tree.map(_forget_varying.bind, arrays))
        return jax.tree.map(functools.partial(_varying_over, axes), made)

    return partitioned


def _varying(*trees: Any) -> frozenset[str]:
    """The manual axes, of `jax.shard_map`, that one of the arrays varies over."""
    types = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(trees))
    return frozenset().union(*(x.varying for x in types))


def _varying_over(axes: frozenset[str], x: Array) -> Array:
    missing = tuple(axes - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


_forget_varying = Primitive("forget_varying")
"""The array as it is, its type varying over no manual axis: in kernels, JAX 0.12 refuses what
does."""
_forget_varying.def_abstract_eval(lambda x: type(x)(x.shape, x.dtype))
mlir.register_lowering(_forget_varying, lambda _, x: [x])


def _others(*trees: Any) -> tuple[str, ...]:
    """The axes that are neither the batch nor the heads, in the order in which they appear."""
    names = dict.fromkeys(name for axes in jax.tree.leaves(trees) for name in axes.split())
    return tuple(name for name in names if name not in ("b", "h"))


def _sharding(mesh: Any, sharded: Mapping[str, Any], axes: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(sharded.get(name) for name in axes.split())))
