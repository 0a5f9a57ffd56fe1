"""The border to the Pallas kernels: whether they run here, and take a call.

An implementation that cannot take a call raises NotImplementedError, and whoever chose it takes the
next. From version to version JAX renames what kernels import, and checks more of what they do:
whatever it raises is such a refusal, too.
"""

import contextvars
import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from e88_jax.config import E88Config
from e88_jax.mixers.base import Implementation
from e88_jax.typed import jit, vjp
from pallas_kernels import target
from pallas_kernels.limits import UnsupportedError

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class NotWorthIt(NotImplementedError):  # noqa: N818  (XLA is meant to be taken: no fault)
    """A call for which XLA is meant to be taken: no warning."""


def require(implementation: Implementation | None) -> None:
    """Raises:
    NotImplementedError: kernels do not run on the target or with this JAX, or are not asked for.
    """
    if implementation == "scan":
        raise NotWorthIt("is not asked for")
    if refusal := target.kernels_refusal(target.current()):
        raise NotWorthIt(refusal)
    _require_import()


@functools.cache
def log_once(message: str) -> None:
    """Warns, the first time."""
    _log.warning(message)


def log_fallback(what: str, refusal: NotImplementedError) -> None:
    """Warns once that XLA computes `what`, where kernels run but refuse it."""
    if not isinstance(refusal, NotWorthIt):
        log_once(f"XLA computes {what}: the kernel {refusal}")


def call(
    function: Callable[..., Result], *arguments: Any, gradient: bool = True, **options: Any
) -> Result:
    """`function(*arguments, **options)`, once it is known that JAX can lower it for a GPU.

    Kernels are lowered, and those of a gradient traced, after the call of the function has
    returned, too late to compute the same without them. So the function is lowered before that,
    once for each of its arguments' shapes: a few tenths of a second of a CPU core.

    Args:
        function: a function of the kernels.
        arguments, options: arrays, trees of them or None, and hashable options.
        gradient: whether its gradient is lowered too.

    Raises:
        NotImplementedError: the kernels do not take the call, or JAX not the kernels.
    """
    leaves, tree = jax.tree.flatten((arguments, options))
    abstract = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves
    )
    refusal = _lowering_refusal(function, gradient, tree, tuple(abstract), target.current())
    if refusal is not None:
        raise refusal
    return function(*arguments, **options)


def head_columns(config: E88Config) -> Any:
    """The layer's columns of q, k and v in a matmul's output, as the kernels are told."""
    from pallas_kernels.qkv_activation import HeadColumns

    return HeadColumns(
        config.n_heads, config.n_state, config.n_value, config.use_silu, config.use_l2_norm
    )


def _refusal(what: str, error: Exception) -> NotImplementedError:
    first_line = str(error).partition("\n")[0]
    refusal = NotImplementedError(
        f"cannot be {what} with JAX {jax.__version__} ({type(error).__name__}: {first_line})"
    )
    refusal.__cause__ = error
    return refusal


def _require_import() -> None:
    """Raises:
    NotImplementedError: the kernels' modules cannot be imported. Not every platform's jaxlib has
        what they import.
    """
    if (refusal := _import_refusal()) is not None:
        raise refusal


@functools.cache
def _import_refusal() -> NotImplementedError | None:
    try:
        for op in ("recurrence", "qkv_activation", "decode"):
            importlib.import_module(f"pallas_kernels.{op}")
    except Exception as error:
        return _refusal("imported", error)
    return None


@functools.cache
def _lowering_refusal(
    function: Callable[..., Any],
    gradient: bool,
    tree: Any,
    leaves: tuple[Any, ...],
    _target: target.Target,
) -> NotImplementedError | None:
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    floats = {i: x for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    others = {i: x for i, x in arrays.items() if i not in floats}
    refusals: list[NotImplementedError] = []

    def run(floats: Any, others: Any) -> Any:
        given = floats | others
        arguments, options = tree.unflatten(given.get(i, x) for i, x in enumerate(leaves))
        return function(*arguments, **options)

    def both_passes(floats: Any, others: Any) -> Any:
        def of_floats(floats: Any) -> Any:
            return run(floats, others)

        results, pullback = vjp(of_floats, floats)
        return pullback(results)

    def lower() -> None:
        try:
            program: Any = jit(both_passes if gradient else run)
            program.trace(floats, others).lower(lowering_platforms=("cuda",))
        except UnsupportedError as refusal:
            refusals.append(refusal)
        except Exception as error:
            refusals.append(_refusal("lowered", error))

    # A thread has none of the caller's transformations and meshes, but its target. Under a mesh,
    # kernels are not lowered before XLA compiles the program.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(lower,))
    thread.start()
    thread.join()
    return refusals[0] if refusals else None
