"""State-space duality, the recurrence of Mamba2: arguments and choice of implementation.

`sequential.py` has its definition, `chunked.py` its chunk form.
"""

import functools

import jax.numpy as jnp
from jax import Array

from e88_jax import implementations
from e88_jax.checks import as_array, require_wide
from e88_jax.documents import Inputs
from e88_jax.implementations import Implementations
from e88_jax.mixers.base import Implementation
from e88_jax.ops import hopper
from e88_jax.ops.arguments import checked, run_checked
from e88_jax.ops.chunked import chunked
from e88_jax.ops.sequential import sequential
from e88_jax.precision import wide_dtype

IMPLEMENTATIONS: Implementations = {
    "mosaic_gpu": hopper.ssd,
    "chunked": functools.partial(chunked, delta_rule=False),
    "scan": functools.partial(sequential, delta_rule=False),
}
_NAME = "ssd"


def ssd(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """Runs a state-space model with a scalar decay over T steps (Mamba2: `docs/references.md`).

    Per batch row and head, with a state `S` of shape `[N, P]`:

        S_t = exp(dt_t a) S_{t-1} + dt_t b_t x_t^T
        y_t = S_t^T c_t

    Mamba2's skip `D x` is the caller's. Running T steps equals running any split of them with the
    state handed over, outputs and gradients alike; decoding is T = 1 of the same function.
    Differentiable in every array, through both results.

    Args:
        x: inputs `[B, T, H, P]`, float32, bfloat16 or float64.
        dt: step sizes, at least 0, `[B, T, H]` float32.
        a: rates, at most 0, `[H]` float32.
        b, c: `[B, T, G, N]` in x's dtype; H is a multiple of G, and head h has the b and c of group
            h // (H / G).
        initial_state: `[B, H, N, P]` float32; None is zeros.
        segment_ids: packed documents, `[B, T]` int32: where the id changes from t-1 to t, step t
            starts from a zero state. Token 0 continues `initial_state`. Documents are apart even
            where one is not finite.
        lengths: steps of each row, `[B]` int32 from 0 to T, of a batch padded on the right: the
            final state is that after a row's own last step, and outputs after it are zeros. None:
            every row has T.
        implementation: `"scan"` (step by step), `"chunked"` (chunks of 64 steps, plain JAX on every
            platform), `"mosaic_gpu"` (GPU kernels of jax-linear-attention: Hopper GPUs, bfloat16,
            N and P of 64 or 128), or None for the fastest that takes the call.

    Returns:
        `(y, final_state)`: y `[B, T, H, P]` in x's dtype, and the state after step T,
        `[B, H, N, P]` float32. State and sums are float32, float64 for float64 inputs; then the
        other arrays may be float64 too.

    Raises:
        TypeError: an argument of another type; NumPy arrays and lists are arrays.
        ValueError: a shape, dtype or option that no implementation could take.
        NotImplementedError: the named implementation cannot take this call.
    """
    implementations.check(_NAME, IMPLEMENTATIONS, implementation)
    arrays = {"c": c, "b": b, "x": x, "dt": dt}
    inputs, *rows = checked(arrays, initial_state, segment_ids, lengths)
    inputs = inputs._replace(decay=_log_decay(inputs, as_array("a", a, "[H]")))

    return run_checked(_NAME, IMPLEMENTATIONS, implementation, inputs, *rows)


def _log_decay(inputs: Inputs, a: Array) -> Array:
    x, dt = inputs.v, inputs.decay
    if a.shape != (heads := dt.shape[-1:]):
        raise ValueError(
            f"a must have shape {heads} to go with x of shape {x.shape}, got {a.shape}."
        )
    require_wide("a", a, x.dtype)
    # As the write gate, a dt that is not finite is kept in its document. Here a's gradient, a sum
    # over all documents, would have 0 * NaN of it.
    dt = jnp.where(jnp.isfinite(dt), dt, 0)
    dtype = wide_dtype(x.dtype)
    return dt.astype(dtype) * a.astype(dtype)[None, None]
