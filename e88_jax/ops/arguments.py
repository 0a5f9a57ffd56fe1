"""Arguments of the linear recurrences: checks, documents and rows, mesh axes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from e88_jax import implementations
from e88_jax.checks import as_array, as_integers, as_lengths, require_wide
from e88_jax.documents import Inputs, of_rows
from e88_jax.implementations import Implementations
from e88_jax.meshes import varying_alike, with_automatic_axes
from e88_jax.mixers.base import Implementation
from pallas_kernels import target

_AXES = Inputs("b t h n", "b t h n", "b t h v", "b t h", "b t h", "b h n v")  # pyright: ignore[reportArgumentType]


def fastest_first(time: Any) -> tuple[Implementation, ...]:
    """Implementations in the order in which they are tried, for so many steps.

    A single step has no chunks; a number that is symbolic, of `jax.export`, cannot be divided.
    """
    if not isinstance(time, int) or time == 1:
        return ("scan",)
    on_gpu = target.current().platform == "gpu"
    return ("mosaic_gpu", "chunked") if on_gpu else ("chunked",)


def checked(
    arrays: Mapping[str, Array], initial_state: Any, segment_ids: Any, lengths: Any
) -> tuple[Inputs, Array | None, Array | None]:
    """The arguments of a linear recurrence as arrays.

    Args:
        arrays: by the names that errors give them: q and k `[B, T, G, K]`, v `[B, T, H, V]`,
            log_decay and write_gate `[B, T, H]`, or one array in place of these two.
        initial_state, segment_ids, lengths: as `gated_delta_rule` takes them.

    Raises:
        TypeError, ValueError: as `gated_delta_rule`.
    """
    forms = ("[B, T, G, K]", "[B, T, G, K]", "[B, T, H, V]", "[B, T, H]", "[B, T, H]")
    (q_name, q), (k_name, k), (v_name, v), *of_heads = (
        (name, as_array(name, x, form))
        for (name, x), form in zip(arrays.items(), forms, strict=False)
    )
    for name, x in ((q_name, q), (v_name, v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must have four axes, none empty, got shape {x.shape}.")
    batch, time, groups, n_key = q.shape
    heads = v.shape[2]
    if heads % groups:
        raise ValueError(
            f"heads of {v_name} must be a multiple of those of {q_name}, {groups}, got {heads}."
        )
    shapes = {
        k_name: (k, q.shape),
        v_name: (v, (batch, time, *v.shape[2:])),
        **{name: (x, (batch, time, heads)) for name, x in of_heads},
    }
    if initial_state is not None:
        initial_state = as_array("initial_state", initial_state, "[B, H, K, V]")
        shapes["initial_state"] = initial_state, (batch, heads, n_key, v.shape[-1])
    for name, (x, shape) in shapes.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with {q_name} of shape {q.shape} and "
                f"{v_name} of {v.shape}, got {x.shape}."
            )
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"{q_name} must be float32, bfloat16 or float64, got {q.dtype}.")
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have {q_name}'s dtype {q.dtype}, got {x.dtype}.")
    for name, x in (*of_heads, ("initial_state", initial_state)):
        if x is not None:
            require_wide(name, x, q.dtype)
    if segment_ids is not None:
        segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", (batch, time))
    if lengths is not None:
        lengths = as_lengths(lengths, batch, time)
    return Inputs(q, k, v, of_heads[0][1], of_heads[-1][1], initial_state), segment_ids, lengths


def run_checked(
    op: str,
    known: Implementations,
    named: Implementation | None,
    inputs: Inputs,
    segment_ids: Array | None,
    lengths: Array | None,
) -> tuple[Array, Array]:
    """A linear recurrence on rows of documents, under any mesh axes.

    Args:
        op: its name.
        known: its implementations, which take the arguments of `sequential`.
        named: the implementation to run; None for the fastest that takes the call.
        inputs, segment_ids, lengths: as `checked` returns them.
    """

    def of_live_rows(*arrays: Any) -> tuple[Array, Array]:
        # Steps past the end of a row are zeros, which leave the state as it is.
        order = fastest_first(arrays[0].shape[1])
        return implementations.run(op, known, named, order, *arrays[:-1])

    def run(*arrays: Any) -> tuple[Array, Array]:
        return of_rows(of_live_rows, *varying_alike(*arrays))

    axes = _AXES, "b t", "b"
    arguments = inputs, segment_ids, lengths
    return with_automatic_axes(run, arguments, axes, (_AXES.v, _AXES.initial_state))
