"""The E88 layer: input projections, recurrence, output gate, output projection."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export

from e88_jax import kernels, token_kernel
from e88_jax.activation import activate_qkv
from e88_jax.checks import require_instance, require_int, require_rngs
from e88_jax.config import E88Config
from e88_jax.decay import Decay
from e88_jax.head_mix import HeadMix
from e88_jax.mixers.base import Execution
from e88_jax.mixers.call import call_checked, check_batch
from e88_jax.precision import compute_dtype, wide, wide_dtype
from e88_jax.projection import InputProjections, JoinedInputProjections, Read
from e88_jax.recurrence import e88_recurrence
from e88_jax.short_conv import ShortConv


class E88State(NamedTuple):
    """The state of a layer between calls."""

    recurrent: Array
    """The heads' states, `[B, H, N, V]` float32."""
    conv: Array | None
    """The last inputs of the short convolution, `[B, conv_size - 1, H, 2N + V]` in the compute
    dtype; None without one."""

    AXES = ("b h", "b c h")
    """Names of the first axes of each array: b the batch, h the heads."""


export.register_namedtuple_serialization(E88State, serialized_name="e88_jax.E88State")


class E88Mixer(nnx.Module):
    """One E88 layer; `y, state = mixer(x, state, segment_ids)`.

    For each token, with x `[dim]` its input and heads `h`:

        q, k, v = silu(W_qkv[h] x)                              short convolution before, if any
        q, k    = q / ||q||, k / ||k||
        decay   = exp(-exp(A_log) * softplus(W_a x + dt_bias))  by decay_mode
        beta    = write_gate_scale * sigmoid(W_w x)             write_gate; else 1
        S       = tanh(decay * S + k (beta * (v - S^T k))^T)    the state, [N, V]
        o       = S^T q
        y       = sum_h W_o[h] (o * silu(W_g[h] x))             by output_gate and head_mix

    Parameters are float32 and head-major: `W_qkv` is `[dim, H, 2N + V]`, `W_g` `[dim, H, V]`, `W_o`
    `[H, V, dim]`. No biases.

    Args:
        config: sizes and options.
        dim: width of x.
        execution: compute dtype, implementation of the recurrence, interval of its saved states.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: an argument of another type.
        ValueError: dim is below 1.
    """

    def __init__(
        self,
        config: E88Config,
        dim: int,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        *,
        rngs: nnx.Rngs,
    ):
        require_instance("config", config, E88Config)
        require_instance("execution", execution, Execution)
        require_rngs(rngs)
        self.config, self.execution = config, execution
        self.dim = require_int("dim", dim)
        self.dtype = compute_dtype(execution.dtype)
        self.inputs: InputProjections | JoinedInputProjections = InputProjections(
            config, dim, self.dtype, rngs=rngs
        )
        channels, size = (config.n_heads, config.head_columns), config.conv_size
        self.conv = None if size is None else ShortConv(channels, size, rngs=rngs)
        self.decay = Decay(config, rngs=rngs)
        self.heads = HeadMix(config, dim, self.dtype, rngs=rngs)

    def init_state(self, batch: int, context: int | None = None) -> E88State:
        """The state before the first token: zeros. `context` is ignored.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        check_batch(batch)
        config = self.config
        shape = (batch, config.n_heads, config.n_state, config.n_value)
        conv = None if self.conv is None else self.conv.init_state(batch, self.dtype)
        return E88State(jnp.zeros(shape, wide_dtype(self.dtype)), conv)

    def __call__(
        self,
        x: Array,
        state: E88State | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, E88State]:
        """Mixes over time.

        Args:
            x: `[B, T, dim]`, any float dtype.
            state: what the call before returned; None starts from zeros.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right:
                the state is that after a row's own last token, and y after it is zeros. None: T.

        Returns:
            `(y, state)`: y `[B, T, dim]` in the compute dtype.

        Raises:
            TypeError: an argument of another type.
            ValueError: x is not `[B, T, dim]` or empty, or the state, the ids or the lengths do not
                go with it.
        """
        arguments = x, state, segment_ids, lengths
        return call_checked(type(self)._mix, self, self.dim, E88State, *arguments)

    def _mix(
        self, x: Array, state: E88State, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, E88State]:
        """`__call__` with checked arguments."""
        config, implementation = self.config, self.execution.implementation
        y, *others = self.inputs(x)
        conv = None
        if self.conv is None:
            q, k, v, rest = activate_qkv(config, y, self.inputs.n_rest, implementation)
        else:
            y, rest = jnp.split(y, [config.n_heads * config.head_columns], axis=2)
            y = y.reshape(*y.shape[:2], config.n_heads, config.head_columns)
            assert state.conv is not None, "the state is checked"
            y, conv = self.conv(y, state.conv, segment_ids, lengths)
            q, k, v, _ = activate_qkv(config, y.reshape(*y.shape[:2], -1), 0, implementation)
        read = self.inputs.split(rest, *others)
        decay, write_gate = self._scalars(read, x.shape[:2])
        out, recurrent = e88_recurrence(
            q,
            k,
            v,
            decay,
            write_gate=write_gate,
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            lengths=lengths,
            linear_state=config.linear_state,
            saved_state_interval=self.execution.saved_state_interval,
            implementation=implementation,
        )
        return self.heads(out, v, read), E88State(recurrent, conv)

    def _scalars(self, read: Read, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        """Decay and write gate of each head and step, `[B, T, H]`."""
        decay = self.decay(read.decay, shape, wide_dtype(self.dtype))
        if read.write_gate is None:
            return decay, None
        return decay, self.config.write_gate_scale * jax.nn.sigmoid(wide(read.write_gate))

    def for_inference(self) -> "E88InferenceMixer":
        """The layer laid out for decoding, as `LanguageModel.for_inference` says; this one stays as
        it is."""
        return E88InferenceMixer(self)


class E88InferenceMixer(E88Mixer):
    """`E88Mixer` with weights laid out for decoding; see `E88Mixer.for_inference`."""

    def __init__(self, trained: E88Mixer):
        self.config, self.execution = trained.config, trained.execution
        self.dim, self.dtype = trained.dim, trained.dtype
        self.inputs = trained.inputs.for_inference()
        self.conv = None if trained.conv is None else nnx.clone(trained.conv)
        self.decay = nnx.clone(trained.decay)
        self.heads = trained.heads.for_inference()

    def _mix(
        self, x: Array, state: E88State, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, E88State]:
        if x.shape[1] == 1 and segment_ids is None and lengths is None:
            try:
                return self._token(x, state)
            except NotImplementedError as refusal:
                kernels.log_fallback("a layer's token", refusal)
        return super()._mix(x, state, segment_ids, lengths)

    def _token(self, x: Array, state: E88State) -> tuple[Array, E88State]:
        """`_mix` for T = 1, with one kernel between the two matmuls.

        Raises:
            NotImplementedError: the kernel does not run on the target, or not for this layer.
        """
        config, inputs = self.config, self.inputs
        token_kernel.require(config, self.execution.implementation)
        assert isinstance(inputs, JoinedInputProjections)
        (y,) = inputs(x)
        qkv_columns = config.n_heads * config.head_columns
        decay, write_gate = self._scalars(inputs.split(y[:, :, qkv_columns:]), x.shape[:2])
        gate_start = inputs.gate_start(qkv_columns)
        out, recurrent = token_kernel.decode(
            config, y, gate_start, decay, write_gate, state.recurrent
        )
        return self.heads.projection(out), E88State(recurrent, None)
