"""Functions of JAX and Flax whose own annotations are incomplete, with types."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name  # pyright: ignore[reportUnknownVariableType]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")

Variables = nnx.State[Any, Any]
"""The variables of a module, such as its parameters, by path."""

einsum = cast("Callable[..., Array]", jnp.einsum)  # pyright: ignore[reportUnknownMemberType]


def jit(function: F, **options: Any) -> F:
    """`jax.jit`, which keeps the function's type."""
    return cast(F, jax.jit(function, **options))  # pyright: ignore[reportUnknownMemberType]


def checkpoint(function: F, **options: Any) -> F:
    """`jax.checkpoint`, which keeps the function's type."""
    return cast(F, jax.checkpoint(function, **options))  # pyright: ignore


def named(x: Array, name: str) -> Array:
    """`jax.ad_checkpoint.checkpoint_name`: x, which policies of `checkpoint` know by this name."""
    return checkpoint_name(x, name)


def shapes_of(function: Callable[..., T], *arguments: Any) -> T:
    """`jax.eval_shape`: what the function returns, with shapes in place of arrays."""
    return cast(T, jax.eval_shape(function, *arguments))  # pyright: ignore[reportUnknownMemberType]


def vjp(function: Callable[..., T], *primals: Any) -> tuple[T, Callable[[T], tuple[Any, ...]]]:
    """`jax.vjp`."""
    return jax.vjp(function, *primals)  # pyright: ignore


def stored(x: Array) -> Array:
    """x, which XLA stores: it fuses nothing across, nor across x's gradient."""
    return cast(Array, jax.lax.optimization_barrier(x))  # pyright: ignore


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have one structure."""
    return jax.tree.structure(a) == jax.tree.structure(b)


def split(module: M) -> tuple[nnx.GraphDef[M], Variables]:
    """`nnx.split`."""
    return nnx.split(module)  # pyright: ignore


def params_of(module: nnx.Module) -> Variables:
    """The module's parameters."""
    return nnx.state(module, nnx.Param)  # pyright: ignore


def params_by_path(module: nnx.Module) -> dict[str, "nnx.Param[Array]"]:
    """The module's parameters by dotted path."""
    flat = nnx.to_flat_state(params_of(module))  # pyright: ignore
    return {".".join(map(str, path)): param for path, param in flat}  # pyright: ignore


def set_params(module: nnx.Module, arrays: dict[str, Array]) -> None:
    """Gives parameters, by dotted path, other values."""
    params = params_by_path(module)
    state = [
        (tuple(path.split(".")), params[path].replace(x))  # pyright: ignore
        for path, x in arrays.items()
    ]
    nnx.update(module, nnx.from_flat_state(state))  # pyright: ignore
