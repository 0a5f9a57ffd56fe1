"""Kernel calls under `jax.vmap` and in sharded programs.

Rows of the batch and heads are independent: each device runs the kernel on its shard of the batch
and of the heads, with mapped axes folded into the batch. No call can be differentiated here; the
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

    @functools.cache
    def over_mapped(n: int) -> Any:
        """`call` of arrays that have n axes of `jax.vmap` before the batch: one function for all
        calls, so that calls alike are compiled once."""
        # Each device folds the axes of its shard: whole arrays could not be with rows sharded.
        folded = _fold(call, n) if n else call
        # The interpreter has side effects, which a partitioned function cannot have.
        function = custom_vmap(_partitioned(folded, arguments, results, n) if partition else folded)

        @function.def_vmap
        def _(axis_size: int, in_batched: Any, *arrays: ArrayTree) -> tuple[ArrayTree, Any]:
            def map_all(x: Array, batched: bool) -> Array:
                return x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))

            made = over_mapped(n + 1)(*jax.tree.map(map_all, arrays, tuple(in_batched)))
            return made, jax.tree.map(lambda _: True, made)

        return function

    differentiated = jax.custom_jvp(over_mapped(0))

    @differentiated.defjvp
    def _(*_: Any) -> Any:
        raise NotImplementedError(no_derivative)

    return differentiated


_MAPPED = "mapped"
"""The names of axes of `jax.vmap` begin so."""


def _fold(call: Callable[..., ArrayTree], n: int) -> Callable[..., ArrayTree]:
    """Returns `call` with the first n axes of every array folded into the next, the batch."""

    def folded(*arrays: ArrayTree) -> ArrayTree:
        mapped = jax.tree.leaves(arrays)[0].shape[:n]
        results = call(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[n + 1 :]), arrays))
        return jax.tree.map(lambda x: x.reshape(*mapped, -1, *x.shape[1:]), results)

    return folded


def _partitioned(
    call: Callable[..., ArrayTree],
    arguments: AxesTree,
    results: Callable[..., AxesTree],
    n_mapped: int,
) -> Callable[..., ArrayTree]:
    """Returns `call`, of arrays with n_mapped axes before their own, run by each device on its
    shard."""

    def partitioned(*arrays: ArrayTree) -> ArrayTree:
        given = jax.tree.map(
            lambda x, axes: None if x is None else axes,
            arrays,
            arguments,
            is_leaf=lambda x: x is None,
        )
        mapped = "".join(f"{_MAPPED}{i} " for i in range(n_mapped))
        argument_axes, result_axes = jax.tree.map(
            lambda names: mapped + names, (given, results(*given))
        )

        def partition(mesh: Mesh, shapes: Any, result_shapes: Any) -> Any:
            first, names = (jax.tree.leaves(x)[0] for x in (shapes, argument_axes))
            spec = dict(zip(names.split(), first.sharding.spec, strict=True))
            sharded = {name: part for name, part in spec.items() if _can_be_sharded(name)}

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


def _can_be_sharded(name: str) -> bool:
    """Whether an axis is the batch, the heads or mapped."""
    return name in ("b", "h") or name.startswith(_MAPPED)


def _others(*trees: AxesTree) -> tuple[str, ...]:
    """The axes that cannot be sharded, in order of appearance."""
    names = dict.fromkeys(name for axes in jax.tree.leaves(trees) for name in axes.split())
    return tuple(name for name in names if not _can_be_sharded(name))


def _sharding(mesh: Mesh, sharded: Mapping[str, Any], axes: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(sharded.get(name) for name in axes.split())))
