"""The Mamba2 layer: projection, short convolution, state-space model, gated norm."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export, lax

from e88_jax.checks import require_instance, require_int, require_rngs
from e88_jax.decay import StepAndRate
from e88_jax.documents import live_steps
from e88_jax.meshes import named_axes
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import Mamba2Config
from e88_jax.mixers.call import call_checked, check_batch
from e88_jax.ops import ssd
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


class Mamba2State(NamedTuple):
    """The state of a layer between calls.

    `mamba_ssm`'s `Mamba2` (Mamba: `docs/references.md`) caches the same. Its `ssm_state` is
    `[B, H, P, N]`. Its `conv_state` has the last conv_size inputs, `[B, channels, conv_size]` with
    the newest last, and channels of x, then B, then C:
    `x_conv = conv_state[:, : H * P, 1:].swapaxes(1, 2).reshape(B, conv_size - 1, H, P)`.
    """

    recurrent: Array
    """The heads' states, `[B, H, N, P]` float32."""
    x_conv: Array
    """The last inputs of the convolution on x, `[B, conv_size - 1, H, P]` in the compute dtype."""
    b_conv: Array
    """The same for B, `[B, conv_size - 1, G, N]`."""
    c_conv: Array
    """The same for C."""

    AXES = ("b h", "b c h", "b c h", "b c h")
    """Names of the first axes of each array: b the batch, h the heads."""


export.register_namedtuple_serialization(Mamba2State, serialized_name="e88_jax.Mamba2State")


class Mamba2Mixer(nnx.Module):
    """One Mamba2 layer (`docs/references.md`); `y, state = mixer(x, state, segment_ids)`.

    For each token, with u `[dim]` its input, heads `h` and their groups `g`:

        x, B, C = silu(conv(W_x[h] u)), silu(conv(W_B[g] u)), silu(conv(W_C[g] u))
        dt      = softplus(W_dt u + dt_bias)
        S       = exp(-exp(A_log) dt) S + dt B x^T      the state, [N, P]
        o       = S^T C + D x
        y       = W_out rmsnorm(o * silu(W_z[h] u))     over the heads of a group

    The convolutions have biases, the projections none. Parameters are float32 and head-major:
    `W_x`, `W_z` `[dim, H, P]`, `W_B`, `W_C` `[dim, G, N]`, `W_out` `[H, P, dim]`.

    Args:
        config: sizes.
        dim: width of u.
        execution: compute dtype, implementation of the recurrence.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: an argument of another type.
        ValueError: dim is below 1, or does not go with the sizes.
    """

    def __init__(
        self,
        config: Mamba2Config,
        dim: int,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        *,
        rngs: nnx.Rngs,
    ):
        require_instance("config", config, Mamba2Config)
        require_instance("execution", execution, Execution)
        require_rngs(rngs)
        self.config, self.execution = config, execution
        self.dim = require_int("dim", dim)
        self.dtype = dtype = compute_dtype(execution.dtype)
        self.n_heads = heads = config.n_heads(dim)
        channels, states = (heads, config.head_dim), (config.n_groups, config.d_state)
        self.inputs: ProjectionGroup | JoinedProjectionGroup = ProjectionGroup(
            dim,
            {"z": channels, "x": channels, "b": states, "c": states, "dt": (heads,)},
            dtype=dtype,
            rngs=rngs,
        )
        self.x_conv, self.b_conv, self.c_conv = (
            ShortConv(shape, config.conv_size, bias=True, silu=True, rngs=rngs)
            for shape in (channels, states, states)
        )
        self.decay = StepAndRate(heads, rngs=rngs)
        self.skip = nnx.Param(jnp.ones((heads,), jnp.float32), **named_axes("heads"))
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32), **named_axes("heads", None))
        self.projection: AnyProjection = Projection(
            channels, (dim,), dtype=dtype, kernel_init=TORCH_LINEAR, rngs=rngs, axes=TO_DIM
        )

    def init_state(self, batch: int, context: int | None = None) -> Mamba2State:
        """The state before the first token: zeros. `context` is ignored.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        check_batch(batch)
        config, convs = self.config, (self.x_conv, self.b_conv, self.c_conv)
        shape = (batch, self.n_heads, config.d_state, config.head_dim)
        recurrent = jnp.zeros(shape, wide_dtype(self.dtype))
        return Mamba2State(recurrent, *(conv.init_state(batch, self.dtype) for conv in convs))

    def __call__(
        self,
        x: Array,
        state: Mamba2State | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, Mamba2State]:
        """Mixes over time; arguments, results and errors are those of `Mixer.__call__`."""
        arguments = x, state, segment_ids, lengths
        return call_checked(type(self)._mix, self, self.dim, Mamba2State, *arguments)

    def _mix(
        self, u: Array, state: Mamba2State, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, Mamba2State]:
        """`__call__` with checked arguments."""
        read = self.inputs(u)
        rows = segment_ids, lengths
        x, x_conv = self.x_conv(read["x"], state.x_conv, *rows)
        b, b_conv = self.b_conv(read["b"], state.b_conv, *rows)
        c, c_conv = self.c_conv(read["c"], state.c_conv, *rows)
        dt = self.decay.step(read["dt"])
        out, recurrent = ssd(
            *(x, dt, self.decay.rate(dt.dtype), b, c),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            lengths=lengths,
            implementation=self.execution.implementation,
        )
        out = wide(out) + self.skip[None, None, :, None].astype(dt.dtype) * wide(x)
        if lengths is not None:  # past its end the convolutions' biases make x other than zero
            live = live_steps(lengths, u.shape[1])[:, :, None, None]
            out = jnp.where(live, out, jnp.zeros_like(out))
        y = self.projection(self._norm(out * jax.nn.silu(wide(read["z"]))).astype(self.dtype))
        return y, Mamba2State(recurrent, x_conv, b_conv, c_conv)

    def _norm(self, x: Array) -> Array:
        """x `[B, T, H, P]` RMS-normalised over the heads of each group, times the scale."""
        groups = x.reshape(*x.shape[:2], self.config.n_groups, -1)
        mean = jnp.mean(groups * groups, axis=-1, keepdims=True)
        normed = (groups * lax.rsqrt(mean + NORM_EPSILON)).reshape(x.shape)
        return normed * self.scale[None, None].astype(x.dtype)

    def for_inference(self) -> Self:
        """The layer laid out for decoding, as `LanguageModel.for_inference` says; this one stays as
        it is."""
        mixer = nnx.clone(self)  # other variables, of the same arrays
        mixer.inputs = self.inputs.for_inference()
        mixer.projection = self.projection.for_inference()
        return mixer
