"""The gated delta rule as E88's recurrence without its tanh, which E88's GPU kernels run."""

import jax.numpy as jnp
from jax import Array

from e88_jax import kernels
from e88_jax.documents import Inputs
from e88_jax.precision import wide
from pallas_kernels.common.padding import padded
from pallas_kernels.limits import SIZE_MULTIPLE

LOWEST_LOG_DECAY = -40.0
"""Lower decays are taken as e^-40, so that v / alpha stays finite; what they keep of a state is
below the rounding of a float32."""
SAVED_STATE_INTERVAL = 32


def as_e88(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
) -> Inputs:
    """The arguments with which E88's linear recurrence is the gated delta rule.

    E88 reads the state before its decay, the gated delta rule after it:

        alpha S + (alpha beta) k (v / alpha - S^T k)^T = alpha (I - beta k k^T) S + beta k v^T

    Args:
        q, k, v, log_decay, write_gate, initial_state: as `ops.sequential` takes them.
    """
    alpha = jnp.exp(jnp.maximum(log_decay, LOWEST_LOG_DECAY))
    shared = v.shape[2] // q.shape[2]
    q, k = (x if shared == 1 else jnp.repeat(x, shared, axis=2) for x in (q, k))
    over_alpha = (wide(v) / alpha[..., None]).astype(v.dtype)
    return Inputs(q, k, over_alpha, alpha, alpha * write_gate, initial_state)


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
    starts: Array | None,
) -> tuple[Array, Array]:
    """`sequential` by the delta rule, by E88's kernels; sizes that are no multiple of 4 are padded.

    Raises:
        NotImplementedError: the kernels do not run on the target, or do not take the call.
    """
    kernels.require("mosaic_gpu")
    from pallas_kernels.recurrence import recurrence

    n_key, n_value = q.shape[-1], v.shape[-1]
    x = as_e88(q, k, v, log_decay, write_gate, initial_state)
    of_heads = 1, 1, 1, SIZE_MULTIPLE
    q, k, v = (padded(array, *of_heads) for array in (x.q, x.k, x.v))
    state = x.initial_state
    if state is not None:
        state = padded(state, 1, 1, SIZE_MULTIPLE, SIZE_MULTIPLE)
    out, state = kernels.call(
        recurrence,
        *(q, k, v, x.decay, x.write_gate, state, starts, None),
        linear_state=True,
        saved_state_interval=SAVED_STATE_INTERVAL,
    )
    return out[..., :n_value], state[..., :n_key, :n_value]
