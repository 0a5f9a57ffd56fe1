"""Whether the JAX at hand takes the Pallas kernels.

From version to version JAX renames what kernels import, and checks more of what they do. Whatever
it raises is a refusal, a NotImplementedError: where no implementation was named, the same is then
computed without kernels.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.limits import UnsupportedError


def _refusal(what: str, error: Exception) -> NotImplementedError:
    first_line = str(error).partition("\n")[0]
    refusal = NotImplementedError(
        f"cannot be {what} with JAX {jax.__version__} ({type(error).__name__}: {first_line})"
    )
    refusal.__cause__ = error
    return refusal


@functools.cache
def import_refusal() -> NotImplementedError | None:
    """Why the kernels' modules cannot be imported, or None if they can.

    Not every platform's jaxlib has what they import.
    """
    try:
        from pallas_kernels import decode, qkv_activation  # noqa: F401
    except Exception as error:
        return _refusal("imported", error)
    return None


def lowering_refusal(
    function: Callable[..., Any], *arguments: Any, gradient: bool = True, **options: Any
) -> NotImplementedError | None:
    """Why JAX cannot lower `function(*arguments, **options)` for a GPU, or None if it can.

    Kernels are lowered, and those of a gradient traced, after the call of the function has
    returned, too late to compute the same without them. So the function is lowered before that,
    once for each of its arguments' shapes: a few tenths of a second of a CPU core.

    Args:
        function: the kernels' function; not run.
        arguments, options: arrays, trees of them or None, and hashable options.
        gradient: whether its gradient is lowered too.
    """
    leaves, tree = jax.tree.flatten((arguments, options))
    abstract = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves
    )
    return _lowering_refusal(function, gradient, tree, tuple(abstract))


@functools.cache
def _lowering_refusal(
    function: Callable[..., Any], gradient: bool, tree: Any, leaves: tuple[Any, ...]
) -> NotImplementedError | None:
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    floats = {i: x for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    others = {i: x for i, x in arrays.items() if i not in floats}
    refusals: list[NotImplementedError] = []

    def call(floats: Any, others: Any) -> Any:
        given = floats | others
        arguments, options = tree.unflatten(given.get(i, x) for i, x in enumerate(leaves))
        return function(*arguments, **options)

    def both_passes(floats: Any, others: Any) -> Any:
        results, pullback = jax.vjp(lambda floats: call(floats, others), floats)
        return pullback(results)

    def lower() -> None:
        try:
            traced = jax.jit(both_passes if gradient else call).trace(floats, others)
            traced.lower(lowering_platforms=("cuda",))
        except UnsupportedError as refusal:
            refusals.append(refusal)
        except Exception as error:
            refusals.append(_refusal("lowered", error))

    # A thread has none of the caller's transformations and meshes. Under a mesh, kernels are not
    # lowered before XLA compiles the program.
    thread = threading.Thread(target=lower)
    thread.start()
    thread.join()
    return refusals[0] if refusals else None
