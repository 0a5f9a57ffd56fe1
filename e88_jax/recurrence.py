"""The E88 recurrence: one function, several implementations.

This module checks the arguments and chooses the implementation; the mathematics is in
`reference.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from e88_jax import implementations, kernels
from e88_jax.checks import (
    as_array,
    as_integers,
    as_lengths,
    require_bool,
    require_int,
    require_wide,
)
from e88_jax.documents import Inputs, of_rows
from e88_jax.meshes import varying_alike, with_automatic_axes
from e88_jax.mixers.base import Implementation
from e88_jax.reference import scan_recurrence
from pallas_kernels import target


def _mosaic_gpu(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
    starts: Array | None,
    live: Array | None,
    *,
    linear_state: bool,
    saved_state_interval: int,
) -> tuple[Array, Array]:
    kernels.require("mosaic_gpu")
    from pallas_kernels.recurrence import recurrence, single_step

    if q.shape[1] == 1:
        return single_step(
            q, k, v, decay, write_gate, initial_state, live, linear_state=linear_state
        )
    return kernels.call(
        recurrence,
        *(q, k, v, decay, write_gate, initial_state, starts, live),
        linear_state=linear_state,
        saved_state_interval=saved_state_interval,
    )


IMPLEMENTATIONS: dict[Implementation, Callable[..., tuple[Array, Array]]] = {
    "mosaic_gpu": _mosaic_gpu,
    "scan": scan_recurrence,
}


def _fastest_first() -> tuple[Implementation, ...]:
    return ("mosaic_gpu", "scan") if target.current().platform == "gpu" else ("scan",)


def e88_recurrence(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    *,
    write_gate: Array | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    linear_state: bool = False,
    saved_state_interval: int = 32,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """Runs the nonlinear matrix-state recurrence over T steps.

    Per batch row and head, with a state `S` of shape `[N, V]`:

        r_t = S_{t-1}^T k_t                        # what the memory holds at address k_t
        d_t = write_gate_t * (v_t - r_t)           # the correction
        S_t = tanh(decay_t * S_{t-1} + k_t d_t^T)
        o_t = S_t^T q_t                            # read after the write

    Running T steps equals running any split of them with the state handed over, outputs and
    gradients alike; decoding is T = 1 of the same function. Differentiable in every array argument,
    through both results: by the scan in both modes and to any order, by the GPU kernel once and in
    reverse mode. Programs with the batch or the heads sharded, over Auto, Explicit or (inside
    `jax.shard_map`) manual mesh axes, run without moving data between devices; a sharded time is
    gathered, as no step can begin before the one before it has ended.

    Args:
        q: queries `[B, T, H, N]`, float32, bfloat16 or (scan only) float64; used as given, so the
            caller normalises.
        k: keys `[B, T, H, N]`, dtype of q.
        v: values `[B, T, H, V]`, dtype of q.
        decay: forget factor in (0, 1] per head and step, `[B, T, H]` float32.
        write_gate: strength of the correction per head and step, `[B, T, H]` float32; None is 1.
        initial_state: `[B, H, N, V]` float32; None is zeros.
        segment_ids: packed documents, `[B, T]` int32: where the id changes from t-1 to t, step t
            starts from a zero state. Token 0 continues `initial_state`. Documents are apart even
            where one is not finite: from there to its end its outputs are NaN and have no gradient,
            and the others are as without it.
        lengths: steps of each row, `[B]` int32 from 0 to T, of a batch padded on the right: the
            final state is that after a row's own last step, outputs after it are zeros, and what
            the arrays hold there is not read. None: every row has T.
        linear_state: leave out the tanh.
        saved_state_interval: steps between states saved for the backward pass, which recomputes
            those between: memory grows with `T / saved_state_interval`. The GPU kernel
            rounds it up to a multiple of 32 and saves bfloat16 states for bfloat16 inputs. Up to 32
            it saves one every 8 steps instead, and the delta `v - S^T k` in float32 in place of v,
            which makes the backward pass faster.
        implementation: `"scan"` (pure JAX, every platform, the numerical definition),
            `"mosaic_gpu"` (GPU kernel: Hopper and datacenter Blackwell GPUs; N and V multiples of 4
            up to 128; float32 and bfloat16), or None for the fastest that takes the call.

    Returns:
        `(out, final_state)`: out `[B, T, H, V]` in v's dtype, and the state after step T,
        `[B, H, N, V]` float32. Sums and state are float32 whatever the inputs are, float64 when the
        inputs are; then decay, write_gate and initial_state may be float64 too.

    Raises:
        TypeError: an argument of another type; NumPy arrays and lists are arrays.
        ValueError: a shape, dtype or option that no implementation could take.
        NotImplementedError: the named implementation cannot take this call.
    """
    q, k = as_array("q", q, "[B, T, H, N]"), as_array("k", k, "[B, T, H, N]")
    v, decay = as_array("v", v, "[B, T, H, V]"), as_array("decay", decay, "[B, T, H]")
    if write_gate is not None:
        write_gate = as_array("write_gate", write_gate, "[B, T, H]")
    if initial_state is not None:
        initial_state = as_array("initial_state", initial_state, "[B, H, N, V]")
    _validate(q, k, v, decay, write_gate, initial_state)
    batch, time = q.shape[:2]
    if segment_ids is not None:
        segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", (batch, time))
    if lengths is not None:
        lengths = as_lengths(lengths, batch, time)
    linear_state = require_bool("linear_state", linear_state)
    saved_state_interval = require_int("saved_state_interval", saved_state_interval)
    implementations.check("e88_recurrence", IMPLEMENTATIONS, implementation)
    inputs = Inputs(q, k, v, decay, write_gate, initial_state)
    axes = Inputs("b t h n", "b t h n", "b t h v", "b t h", "b t h", "b h n v")  # pyright: ignore[reportArgumentType]

    def run(*arrays: Any) -> tuple[Array, Array]:
        recurrence = functools.partial(
            implementations.run,
            "e88_recurrence",
            IMPLEMENTATIONS,
            implementation,
            _fastest_first(),
            linear_state=linear_state,
            saved_state_interval=saved_state_interval,
        )
        return of_rows(recurrence, *varying_alike(*arrays))

    arrays = inputs, segment_ids, lengths
    return with_automatic_axes(run, arrays, (axes, "b t", "b"), (axes.v, axes.initial_state))


def _validate(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    write_gate: Array | None,
    initial_state: Array | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, H, N], got shape {q.shape}.")
    if v.ndim != 4:
        raise ValueError(f"v must be [B, T, H, V], got shape {v.shape}.")
    batch, time, heads, n_state = q.shape
    n_value = v.shape[-1]
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"no axis may be empty, got q of shape {q.shape} and v of {v.shape}.")

    per_step = (batch, time, heads)
    expected_shapes = {
        "k": (k, (*per_step, n_state)),
        "v": (v, (*per_step, n_value)),
        "decay": (decay, per_step),
        "write_gate": (write_gate, per_step),
        "initial_state": (initial_state, (batch, heads, n_state, n_value)),
    }
    for name, (array, shape) in expected_shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with q of shape {q.shape}, "
                f"got {array.shape}."
            )

    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"q must be float32, bfloat16 or float64, got {q.dtype}.")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {array.dtype}.")
    for name, array in (
        ("decay", decay),
        ("write_gate", write_gate),
        ("initial_state", initial_state),
    ):
        if array is not None:
            require_wide(name, array, q.dtype)
