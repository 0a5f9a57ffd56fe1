"""Kernel calls under `jax.vmap` and in sharded programs.

Rows of the batch and heads are independent: a mapped axis is folded into the batch, and each device
runs the kernel on its shard of the batch and of the heads. No call can be differentiated here; the
ops join forward and backward calls by `jax.custom_vjp`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.common.aliases import ArrayTree, AxesTree
from pallas_kernels.common.padding import resized

ONCE = (
    "implementation='mosaic_gpu' differentiates once; use implementation='scan' for derivatives of "
    "higher order."
)


def over_rows(
    call: Callable[..., ArrayTree],
    arguments: AxesTree,
    results: Callable[..., AxesTree],
    partition: bool,
    no_derivative: str = ONCE,
) -> Any:
    """Returns `call` for mapped and sharded arrays.

    Args:
        call: a function of trees of arrays and None.
        arguments: names of the axes of its arguments; "b" is the batch and "h" the heads.
        results: from the axes of the arguments that are not None to those of the results.
        partition: whether it can be sharded.
        no_derivative: the error when it is differentiated.
    """
    # The interpreter has side effects, which a partitioned function cannot have.
    call = _fold_mapped(_partitioned(call, arguments, results) if partition else call)
    call = jax.custom_jvp(call)

    @call.defjvp
    def _(*_: Any) -> Any:
        raise NotImplementedError(no_derivative)

    return call


def _fold_mapped(call: Callable[..., ArrayTree]) -> Any:
    """Returns `call` with the axis of `jax.vmap` folded into axis 0 of every array, the batch."""
    folded = custom_vmap(call)

    @folded.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: ArrayTree) -> tuple[ArrayTree, Any]:
        def fold(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*jax.tree.map(fold, arguments, tuple(in_batched)))
        results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return folded


def _partitioned(
    call: Callable[..., ArrayTree], arguments: AxesTree, results: Callable[..., AxesTree]
) -> Callable[..., ArrayTree]:
    """Returns `call`, run by each device on its shard of the batch and the heads."""

    def partitioned(*arrays: ArrayTree) -> ArrayTree:
        argument_axes = jax.tree.map(
            lambda x, axes: None if x is None else axes,
            arrays,
            arguments,
            is_leaf=lambda x: x is None,
        )
        result_axes = results(*argument_axes)

        def partition(mesh: Mesh, shapes: Any, result_shapes: Any) -> Any:
            first, names = (jax.tree.leaves(x)[0] for x in (shapes, argument_axes))
            spec = dict(zip(names.split(), first.sharding.spec, strict=True))
            sharded = {name: spec[name] for name in ("b", "h") if name in spec}

            def shardings(axes: AxesTree) -> Any:
                return jax.tree.map(functools.partial(_sharding, mesh, sharded), axes)

            def fitted(x: Array, whole: Any, axes: str) -> Array:
                # Blocks of a shard may be padded otherwise than those of the whole.
                sizes = zip(axes.split(), x.shape, whole.shape, strict=True)
                return resized(x, tuple(own if a in sharded else all_ for a, own, all_ in sizes))

            def of_shard(*arrays: ArrayTree) -> ArrayTree:
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


def _varying(*trees: ArrayTree) -> frozenset[str]:
    """The manual axes of `jax.shard_map` that at least one of the arrays varies over."""
    types = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(trees))
    return frozenset().union(*(x.varying for x in types))


def _varying_over(axes: frozenset[str], x: Array) -> Array:
    missing = tuple(axes - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


_forget_varying = Primitive("forget_varying")
"""The identity, with a type that varies over no manual axis: JAX 0.12 refuses others in kernels."""
_forget_varying.def_abstract_eval(lambda x: type(x)(x.shape, x.dtype))
mlir.register_lowering(_forget_varying, lambda _, x: [x])


def _others(*trees: AxesTree) -> tuple[str, ...]:
    """The axes other than batch and heads, in order of appearance."""
    names = dict.fromkeys(name for axes in jax.tree.leaves(trees) for name in axes.split())
    return tuple(name for name in names if name not in ("b", "h"))


def _sharding(mesh: Mesh, sharded: Mapping[str, Any], axes: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(sharded.get(name) for name in axes.split())))
