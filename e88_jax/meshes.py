"""Names of parameters' axes, and arrays over Explicit and manual mesh axes (`jax.make_mesh`,
`jax.shard_map`).

The op, the layer and the model compute under Auto axes, where XLA partitions the program:
`with_automatic_axes` takes Explicit axes off their arguments and puts them on their results. Inside
`jax.shard_map` each device computes on its shard; there `varying_alike` gives arrays one type.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, auto_axes  # pyright: ignore

from e88_jax.typed import Variables, split

Tree = TypeVar("Tree")


def named_axes(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter whose axes have these logical names, None where it has none: "dim" is
    the model's width, "heads" a layer's heads or groups of heads, "hidden" the units of a channel
    mixer.

    `nnx.get_partition_spec` and `nnx.get_named_sharding` turn names into mesh axes by
    `nnx.logical_axis_rules`. A mesh that is set where a model is built does not by itself move its
    parameters.
    """
    return {"out_sharding": axes, "eager_sharding": False}


def names_of(param: nnx.Variable[Any]) -> tuple[str | None, ...]:
    """The names that `named_axes` gave; () for a parameter without."""
    return param.get_metadata().get("out_sharding") or ()


def with_automatic_axes(
    function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Any, ...], results: Any
) -> Any:
    """`function(*arguments)`, in which Explicit mesh axes are Auto.

    Args:
        function: of trees of arrays.
        arguments: arguments of the function; leaves may be None.
        axes: names of the first axes of each argument's arrays, a string or a tree prefix of
            strings: "b" is the batch, "h" the heads; any other axis is not sharded.
        results: the same names for the results. Their batch and heads are sharded as those of the
            first argument that are; all else is gathered.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    divided: dict[str, Any] = {}
    names_of_all = jax.tree.leaves(jax.tree.broadcast(axes, arguments))
    for x, names in zip(jax.tree.leaves(arguments), names_of_all, strict=True):
        for name, part in zip(names.split(), jax.typeof(x).sharding.spec, strict=False):
            taken = frozenset[str]().union(*map(_mesh_axes, divided.values()))
            if name in ("b", "h") and name not in divided and not _mesh_axes(part) & taken:
                divided |= {} if part is None else {name: part}

    def sharding(names: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*map(divided.get, names.split())))

    shardings = jax.tree.map(sharding, results)
    automatic = cast(Any, auto_axes)(function, axes=mesh.explicit_axes, out_sharding=shardings)
    return automatic(*arguments)


def explicit_mesh(arrays: Any) -> Any:
    """The mesh with Explicit axes that one of the arrays is on, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def call_with_automatic_axes(
    method: Callable[..., Any],
    module: nnx.Module,
    arguments: tuple[Any, ...],
    axes: tuple[Any, ...],
    results: Any,
) -> Any:
    """`method(module, *arguments)` by `with_automatic_axes`, whose arguments include the module's
    parameters."""
    graphdef, variables = split(module)

    def call(variables: Variables, *arguments: Any) -> Any:
        return method(nnx.merge(graphdef, variables), *arguments)

    return with_automatic_axes(call, (variables, *arguments), ("", *axes), results)


def _mesh_axes(part: Any) -> set[str]:
    """The mesh axes in an entry of a PartitionSpec."""
    return set() if part is None else {part} if isinstance(part, str) else set(part)


def copied(x: Array, axis: str) -> Array:
    """Identity on what all devices of a mesh axis have alike; the gradient is summed over them.
    Inside `jax.shard_map` with `check_vma=False`."""
    return cast(Array, _copied(axis, x))


def summed(x: Array, axis: str) -> Array:
    """Sum over the devices of a mesh axis, which go on alike; the gradient passes unchanged. Inside
    `jax.shard_map` with `check_vma=False`."""
    return cast(Array, _summed(axis, x))


def _sum(axis: str, x: Array) -> Array:
    return cast(Array, jax.lax.psum(x, axis))  # pyright: ignore


def _same(axis: str, x: Array) -> Array:
    return x


def _with_gradient(function: Any, gradient: Any) -> Any:
    """The function with this one for its gradient. JAX's own gradient of a psum is a psum, as if
    each device went on from the sum by itself."""
    custom = cast(Any, jax.custom_vjp(function, nondiff_argnums=(0,)))

    def forward(axis: str, x: Array) -> tuple[Array, None]:
        return function(axis, x), None

    def backward(axis: str, _: None, d_y: Array) -> tuple[Array]:
        return (gradient(axis, d_y),)

    custom.defvjp(forward, backward)
    return custom


_copied, _summed = _with_gradient(_same, _sum), _with_gradient(_sum, _same)


def varying_alike(*trees: Any) -> Any:
    """The trees, each array varying over all manual mesh axes that any of them varies over."""
    axes = frozenset[str]().union(*map(_varying, jax.tree.leaves(trees)))

    def varied(x: Array) -> Array:
        missing = axes - _varying(x)
        if not missing:
            return x
        return cast(Array, jax.lax.pcast(x, tuple(missing), to="varying"))  # pyright: ignore

    return jax.tree.map(varied, trees)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
