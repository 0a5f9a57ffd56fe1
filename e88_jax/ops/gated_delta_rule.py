"""The gated delta rule, the recurrence of Gated DeltaNet: arguments and choice of implementation.

`sequential.py` has its definition, `chunked.py` its chunk form.
"""

import functools

from jax import Array

from e88_jax import implementations
from e88_jax.implementations import Implementations
from e88_jax.mixers.base import Implementation
from e88_jax.ops import by_e88, hopper
from e88_jax.ops.arguments import checked, run_checked
from e88_jax.ops.chunked import chunked
from e88_jax.ops.sequential import sequential


def _mosaic_gpu(*arrays: Array | None) -> tuple[Array, Array]:
    """The kernels of jax-linear-attention; those of E88, token by token, for what they refuse."""
    try:
        return hopper.gated_delta_rule(*arrays)
    except NotImplementedError as refusal:
        try:
            return by_e88.gated_delta_rule(*arrays)  # pyright: ignore[reportArgumentType]
        except NotImplementedError as other:
            if str(other) == str(refusal):  # of the machine
                raise
            raise NotImplementedError(f"{refusal}; E88's kernels: {other}") from other


IMPLEMENTATIONS: Implementations = {
    "mosaic_gpu": _mosaic_gpu,
    "chunked": functools.partial(chunked, delta_rule=True),
    "scan": functools.partial(sequential, delta_rule=True),
}
_NAME = "gated_delta_rule"


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """Runs the gated delta rule over T steps (Gated DeltaNet: `docs/references.md`).

    Per batch row and head, with a state `S` of shape `[K, V]`, alpha = exp(log_decay) and
    beta = write_gate:

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t

    q is used as given: Gated DeltaNet's scale of 1 / sqrt(K) is the caller's, as is the unit length
    of q and k. With unit keys the state stays bounded for beta from 0 to 2. Running T steps equals
    running any split of them with the state handed over, outputs and gradients alike; decoding is
    T = 1 of the same function. Differentiable in every array, through both results.

    Args:
        q, k: `[B, T, G, K]`, float32, bfloat16 or float64.
        v: `[B, T, H, V]` in q's dtype; H is a multiple of G, and head h has the q and k of head
            h // (H / G).
        log_decay: logarithm of the decay, finite and at most 0, `[B, T, H]` float32.
        write_gate: `[B, T, H]` float32.
        initial_state: `[B, H, K, V]` float32; None is zeros.
        segment_ids: packed documents, `[B, T]` int32: where the id changes from t-1 to t, step t
            starts from a zero state. Token 0 continues `initial_state`. Documents are apart even
            where one is not finite.
        lengths: steps of each row, `[B]` int32 from 0 to T, of a batch padded on the right: the
            final state is that after a row's own last step, and outputs after it are zeros. None:
            every row has T.
        implementation: `"scan"` (step by step), `"chunked"` (chunks of 64 steps, plain JAX on every
            platform), `"mosaic_gpu"` (GPU kernels: those of jax-linear-attention, for bfloat16 and
            heads of some sizes, else E88's, for K and V up to 128), or None for the fastest that
            takes the call.

    Returns:
        `(out, final_state)`: out `[B, T, H, V]` in v's dtype, and the state after step T,
        `[B, H, K, V]` float32. State and sums are float32, float64 for float64 inputs; then the
        other arrays may be float64 too.

    Raises:
        TypeError: an argument of another type; NumPy arrays and lists are arrays.
        ValueError: a shape, dtype or option that no implementation could take.
        NotImplementedError: the named implementation cannot take this call.
    """
    implementations.check(_NAME, IMPLEMENTATIONS, implementation)
    arrays = checked(
        {"q": q, "k": k, "v": v, "log_decay": log_decay, "write_gate": write_gate},
        initial_state,
        segment_ids,
        lengths,
    )

    return run_checked(_NAME, IMPLEMENTATIONS, implementation, *arrays)
