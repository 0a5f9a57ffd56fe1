"""The Gated DeltaNet layer: projections, short convolutions, gated delta rule, gated norm."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export, lax

from e88_jax.checks import require_instance, require_int, require_rngs
from e88_jax.decay import StepAndRate
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import GatedDeltaNetConfig
from e88_jax.mixers.call import call_checked, check_batch
from e88_jax.ops import gated_delta_rule
from e88_jax.precision import NORM_EPSILON, compute_dtype, wide, wide_dtype
from e88_jax.projection import (
    TO_DIM,
    TORCH_LINEAR,
    AnyProjection,
    JoinedProjectionGroup,
    Projection,
    ProjectionGroup,
)
from e88_jax.short_conv import ShortConv

LENGTH_EPSILON = 1e-6
"""Summand to the squared length that divides a query or key, as in flash-linear-attention."""
LOWEST_RATE = 1e-3
"""Lowest initial rate of decay; the original's are uniform in [0, 16], and log 0 is not finite."""


class GatedDeltaNetState(NamedTuple):
    """The state of a layer between calls.

    `fla.layers.GatedDeltaNet` (flash-linear-attention: `docs/references.md`) caches the same.
    Its `recurrent_state` is `[B, HV, V, K]` where states are `state_v_first`, as in its newer
    layers, else `[B, HV, K, V]`. Its `conv_state` is a triple for q, k, v of the last conv_size
    inputs, `[B, channels, conv_size]` with the newest last:
    `q_conv = conv_state[0][:, :, 1:].swapaxes(1, 2).reshape(B, conv_size - 1, H, K)`.
    """

    recurrent: Array
    """The heads' states, `[B, HV, K, V]` float32."""
    q_conv: Array
    """The last inputs of the convolution on q, `[B, conv_size - 1, H, K]` in the compute dtype."""
    k_conv: Array
    """The same for k."""
    v_conv: Array
    """The same for v, `[B, conv_size - 1, HV, V]`."""

    AXES = ("b h", "b c h", "b c h", "b c h")
    """Names of the first axes of each array: b the batch, h the heads."""


export.register_namedtuple_serialization(
    GatedDeltaNetState, serialized_name="e88_jax.GatedDeltaNetState"
)


class GatedDeltaNetMixer(nnx.Module):
    """One Gated DeltaNet layer (`docs/references.md`); `y, state = mixer(x, state, segment_ids)`.

    For each token, with x `[dim]` its input and heads `h`:

        q, k, v = silu(conv(W_q[h] x)), silu(conv(W_k[h] x)), silu(conv(W_v[h] x))
        q, k    = q / sqrt(|q|^2 + 1e-6) / sqrt(K), k / sqrt(|k|^2 + 1e-6)
        alpha   = exp(-exp(A_log) * softplus(W_a x + dt_bias))
        beta    = sigmoid(W_b x)                              twice that: negative_eigenvalues
        S       = alpha (I - beta k k^T) S + beta k v^T       the state, [K, V]
        o       = S^T q
        y       = sum_h W_o[h] (rmsnorm(o) * silu(W_g[h] x))

    Parameters are float32 and head-major: `W_q`, `W_k` `[dim, H, K]`, `W_v`, `W_g` `[dim, HV, V]`,
    `W_o` `[HV, V, dim]`. No biases.

    Args:
        config: sizes and options.
        dim: width of x.
        execution: compute dtype, implementation of the recurrence.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: an argument of another type.
        ValueError: dim is below 1.
    """

    def __init__(
        self,
        config: GatedDeltaNetConfig,
        dim: int,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        *,
        rngs: nnx.Rngs,
    ):
        require_instance("config", config, GatedDeltaNetConfig)
        require_instance("execution", execution, Execution)
        require_rngs(rngs)
        self.config, self.execution = config, execution
        self.dim = require_int("dim", dim)
        self.dtype = dtype = compute_dtype(execution.dtype)
        heads, value_heads = config.n_heads, config.value_heads
        keys, values = (heads, config.head_dim), (value_heads, config.value_dim)
        self.inputs: ProjectionGroup | JoinedProjectionGroup = ProjectionGroup(
            dim,
            {"q": keys, "k": keys, "v": values, "decay": (value_heads,), "write": (value_heads,)},
            {"gate": values},
            dtype=dtype,
            rngs=rngs,
        )
        self.q_conv = ShortConv(keys, config.conv_size, silu=True, rngs=rngs)
        self.k_conv = ShortConv(keys, config.conv_size, silu=True, rngs=rngs)
        self.v_conv = ShortConv(values, config.conv_size, silu=True, rngs=rngs)
        self.decay = StepAndRate(value_heads, LOWEST_RATE, rngs=rngs)
        self.norm = nnx.RMSNorm(config.value_dim, epsilon=NORM_EPSILON, rngs=rngs)
        self.projection: AnyProjection = Projection(
            values, (dim,), dtype=dtype, kernel_init=TORCH_LINEAR, rngs=rngs, axes=TO_DIM
        )

    def init_state(self, batch: int, context: int | None = None) -> GatedDeltaNetState:
        """The state before the first token: zeros. `context` is ignored.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        check_batch(batch)
        config, convs = self.config, (self.q_conv, self.k_conv, self.v_conv)
        shape = (batch, config.value_heads, config.head_dim, config.value_dim)
        recurrent = jnp.zeros(shape, wide_dtype(self.dtype))
        return GatedDeltaNetState(recurrent, *(x.init_state(batch, self.dtype) for x in convs))

    def __call__(
        self,
        x: Array,
        state: GatedDeltaNetState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, GatedDeltaNetState]:
        """Mixes over time; arguments, results and errors are those of `Mixer.__call__`."""
        arguments = x, state, segment_ids, lengths
        return call_checked(type(self)._mix, self, self.dim, GatedDeltaNetState, *arguments)

    def _mix(
        self,
        x: Array,
        state: GatedDeltaNetState,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, GatedDeltaNetState]:
        """`__call__` with checked arguments."""
        read = self.inputs(x)
        rows = segment_ids, lengths
        q, q_conv = self.q_conv(read["q"], state.q_conv, *rows)
        k, k_conv = self.k_conv(read["k"], state.k_conv, *rows)
        v, v_conv = self.v_conv(read["v"], state.v_conv, *rows)
        write_gate = jax.nn.sigmoid(wide(read["write"]))
        if self.config.negative_eigenvalues:
            write_gate = 2 * write_gate
        step = self.decay.step(read["decay"])
        out, recurrent = gated_delta_rule(
            unit_length(q, self.config.head_dim**-0.5),
            unit_length(k),
            v,
            step * self.decay.rate(step.dtype)[None, None],
            write_gate,
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            lengths=lengths,
            implementation=self.execution.implementation,
        )
        gated = self.norm(wide(out)) * jax.nn.silu(wide(read["gate"]))
        y = self.projection(gated.astype(self.dtype))
        return y, GatedDeltaNetState(recurrent, q_conv, k_conv, v_conv)

    def for_inference(self) -> Self:
        """The layer laid out for decoding, as `LanguageModel.for_inference` says; this one stays as
        it is."""
        mixer = nnx.clone(self)  # other variables, of the same arrays
        mixer.inputs = self.inputs.for_inference()
        mixer.projection = self.projection.for_inference()
        return mixer


def unit_length(x: Array, scale: float = 1.0) -> Array:
    """`scale * x / sqrt(|x|^2 + 1e-6)` over the last axis, in float32 (float64 for float64), in x's
    dtype."""
    y = wide(x)
    square = jnp.sum(y * y, axis=-1, keepdims=True)
    return (y * (scale * lax.rsqrt(square + LENGTH_EPSILON))).astype(x.dtype)
