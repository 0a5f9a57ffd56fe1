"""The GPU kernels of jax-linear-attention (`docs/references.md`), for Hopper GPUs.

An optional package: the extra `baselines`. Its version and JAX's are pinned to each other.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Generator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint  # pyright: ignore

from e88_jax import kernels
from e88_jax.typed import jit, vjp

PACKAGE = "jla"
"""The package's name for imports."""


def _call(op: Callable[..., tuple[Array, Array]], *arrays: Array | None) -> tuple[Array, Array]:
    """The op on the arrays that `ops.sequential` takes.

    Raises:
        NotImplementedError: the kernels are not installed, or do not take the call.
    """
    kernels.require("mosaic_gpu")
    if importlib.util.find_spec(PACKAGE) is None:
        raise NotImplementedError(
            "needs jax-linear-attention (pip install 'e88_jax[baselines]', Python 3.12)"
        )
    q, *_ = arrays
    assert q is not None
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"takes bfloat16, got {q.dtype}")
    return kernels.call(op, *map(_row_major, arrays))


def _row_major(x: Array | None) -> Array | None:
    """x, which XLA keeps in the order of its axes, and so its gradient.

    The kernels transpose the gates. XLA would compute those transposed instead, and with them all
    columns of the matmul that they come from, whose convolutions then run along the minor axis.
    """
    if x is None:
        return None
    return cast(Array, with_layout_constraint(x, Layout(tuple(range(x.ndim)))))  # pyright: ignore


def _as_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as a program that is lowered and compiled once for layers alike, both of whose passes
    are traced under JAX's own rules of promotion: the package relies on them, and a caller may have
    stricter ones."""

    @contextlib.contextmanager
    def usual_promotion() -> Generator[None]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield

    def run(*arrays: Any) -> Any:
        with usual_promotion():
            return op(*arrays)

    def forward(*arrays: Any) -> Any:
        with usual_promotion():
            return vjp(op, *arrays)

    def backward(pullback: Callable[..., Any], cotangents: Any) -> Any:
        with usual_promotion():
            return pullback(cotangents)

    run_and_derive = cast(Any, jax.custom_vjp(run))
    run_and_derive.defvjp(forward, backward)
    return jit(functools.wraps(op)(lambda *arrays: run_and_derive(*arrays)))


def _segments(starts: Array | None) -> Array | None:
    return None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)


@_as_one
def _gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
    starts: Array | None,
) -> tuple[Array, Array]:
    run = _kernel("gated_delta_rule", "gated_delta_rule")
    return run(
        *(q, k, v, log_decay, write_gate),
        scale=1.0,
        initial_state=initial_state,
        output_final_state=True,
        segment_ids=_segments(starts),
    )


@_as_one
def _ssd(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
    starts: Array | None,
) -> tuple[Array, Array]:
    written = (write_gate[..., None] * v.astype(write_gate.dtype)).astype(v.dtype)
    options = {
        "scale": 1.0,
        "initial_state": initial_state,
        "output_final_state": True,
        "segment_ids": _segments(starts),
    }
    if reason := _kernel("scalar_gate", "unsupported_reason")(
        q, k, written, (log_decay,), options, delta=False
    ):
        raise ValueError(reason)
    run = _kernel("scalar_gate", "run")
    return run(q, k, written, log_decay, None, delta=False, grouped_key_grads=True, **options)


@functools.cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    return cast(
        "Callable[..., Any]",
        getattr(importlib.import_module(f"{PACKAGE}.ops.mosaic_gpu.{module}"), name),
    )


gated_delta_rule = functools.partial(_call, _gated_delta_rule)
"""`sequential` by the delta rule, by the kernels."""
ssd = functools.partial(_call, _ssd)
"""`sequential` without the delta rule, by the kernels."""
