"""The border to the Pallas kernels: whether they run on the target, and take a call.

An implementation that cannot take a call raises NotImplementedError, and its caller tries the next.
JAX renames what kernels import and checks more from version to version, so any exception of an
import or of lowering is a refusal too.
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


class NotWorthIt(NotImplementedError):  # noqa: N818  (no fault)
    """A call that is XLA's by design: no warning."""


def require(implementation: Implementation | None) -> None:
    """Raises:
    NotImplementedError: kernels do not run on the target or with this JAX (not every platform's
        jaxlib has what they import), or are not asked for.
    """
    if implementation not in (None, "mosaic_gpu"):
        raise NotWorthIt("is not asked for")
    if refusal := target.kernels_refusal(target.current()):
        raise NotWorthIt(refusal)
    if refusal := target.jax_refusal(target.current()):
        raise NotImplementedError(refusal)
    if (failure := _import_refusal()) is not None:
        raise failure


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
    """`function(*arguments, **options)`, after a check that JAX can lower it for a GPU.

    JAX lowers kernels, and traces those of a gradient, after the function has returned, too late
    for a fallback. So the function is lowered beforehand, once per set of shapes, in a few tenths
    of a second of a CPU core.

    Args:
        function: a function of the kernels.
        arguments, options: arrays, trees of them or None, and hashable options.
        gradient: whether its gradient is lowered too.

    Raises:
        NotImplementedError: the kernels do not take the call, or JAX cannot lower them.
    """
    leaves, tree = jax.tree.flatten((arguments, options))
    abstract = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves
    )
    refusal = _lowering_refusal(function, gradient, tree, tuple(abstract), target.current())
    if refusal is not None:
        raise refusal
    return function(*arguments, **options)


def head_columns(config: E88Config) -> Any:
    """The layout of q, k and v in a matmul's output, for the kernels."""
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

    # A new thread has the caller's target but not its transformations and meshes: under a mesh,
    # kernels are lowered only when XLA compiles the program.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(lower,))
    thread.start()
    thread.join()
    return refusals[0] if refusals else None
