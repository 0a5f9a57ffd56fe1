"""Arrays over Explicit and manual mesh axes (`jax.make_mesh`, `jax.shard_map`).

The op, the layer and the model compute as under automatic axes, where XLA divides the work:
`with_automatic_axes` takes Explicit axes off what they are called with and puts them on what they
return. Inside `jax.shard_map` each device computes on its own part; there `varying_alike` gives
arrays one type.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, auto_axes  # pyright: ignore

from e88_jax.typed import Variables, split

Tree = TypeVar("Tree")


def with_automatic_axes(
    function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Any, ...], results: Any
) -> Any:
    """`function(*arguments)`, where Explicit mesh axes are automatic inside.

    Args:
        function: of trees of arrays.
        arguments: what it is called with; leaves may be None.
        axes: for each argument a string, or a tree prefix of strings, that names the first axes of
            its arrays: "b" the rows of the batch, "h" the heads, anything else what is not divided.
        results: the same for what the function returns. Rows and heads of results are divided as
            the first argument's that are; all else is gathered.
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
    """`method(module, *arguments)` by `with_automatic_axes`; the module's parameters are arguments
    too, wherever they are."""
    graphdef, variables = split(module)

    def call(variables: Variables, *arguments: Any) -> Any:
        return method(nnx.merge(graphdef, variables), *arguments)

    return with_automatic_axes(call, (variables, *arguments), ("", *axes), results)


def _mesh_axes(part: Any) -> set[str]:
    """The mesh axes in an entry of a PartitionSpec."""
    return set() if part is None else {part} if isinstance(part, str) else set(part)


def varying_alike(*trees: Any) -> Any:
    """The trees, their arrays varying over every manual mesh axis that one of them varies over."""
    axes = frozenset[str]().union(*map(_varying, jax.tree.leaves(trees)))

    def varied(x: Array) -> Array:
        missing = axes - _varying(x)
        if not missing:
            return x
        return cast(Array, jax.lax.pcast(x, tuple(missing), to="varying"))  # pyright: ignore

    return jax.tree.map(varied, trees)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
