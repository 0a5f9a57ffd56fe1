"""Causal depthwise short convolution with a state for decoding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from e88_jax.documents import document_starts
from e88_jax.precision import wide, wide_dtype


class ShortConv(nnx.Module):
    """Depthwise convolution over time in which token t sees tokens t - size + 1 to t.

    Args:
        channels: axes of a token's input, such as `(H, 2N + V)`.
        size: taps per channel, at least 2.
        bias: add a learned number to each channel.
        silu: apply SiLU to the output.
        rngs: source of the initial weights, uniform in +-1 / sqrt(size) as PyTorch's Conv1d.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        size: int,
        *,
        bias: bool = False,
        silu: bool = False,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.size = size
        self.silu = silu
        others = tuple(range(1, 1 + len(channels)))
        init = initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=others
        )
        # The last tap multiplies the newest token.
        self.taps = nnx.Param(init(rngs.params(), (size, *channels), jnp.float32))
        initial = None
        if bias:
            largest = size**-0.5
            initial = jax.random.uniform(rngs.params(), channels, jnp.float32, -largest, largest)
        self.bias = None if initial is None else nnx.Param(initial)

    def init_state(self, batch: int, dtype: jnp.dtype) -> Array:
        """The state before the first token: `[batch, size - 1, *channels]` zeros."""
        return jnp.zeros((batch, self.size - 1, *self.channels), dtype)

    def __call__(
        self,
        x: Array,
        state: Array,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
    ) -> tuple[Array, Array]:
        """Convolves `x` `[B, T, *channels]`.

        Args:
            x: the input.
            state: the size - 1 inputs before it, `[B, size - 1, *channels]` in x's dtype.
            segment_ids: the document of each token, `[B, T]`; taps do not reach across a change.
                Token 0 continues `state`. None: one document.
            lengths: tokens of each row, `[B]`; None: T.

        Returns:
            The output, of x's shape and dtype, and the state after each row's last token.
        """
        time = x.shape[1]
        padded = jnp.concatenate([state, x], axis=1)
        reached = [padded[:, tap : tap + time] for tap in range(self.size)]
        new_state = self._last(padded, lengths)
        if segment_ids is not None:
            document = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
            before = jnp.zeros((document.shape[0], self.size - 1), jnp.int32)
            documents = jnp.concatenate([before, document], axis=1)
            reached = [
                _zero_unless(documents[:, tap : tap + time] == document, inputs)
                for tap, inputs in enumerate(reached)
            ]
            of_state = self._last(documents, lengths)
            new_state = _zero_unless(of_state == of_state[:, -1:], new_state)
        taps = self.taps[...].astype(wide_dtype(x.dtype))
        y = jnp.asarray(
            sum(taps[None, None, tap] * wide(inputs) for tap, inputs in enumerate(reached))
        )
        if self.bias is not None:
            y += self.bias[None, None].astype(y.dtype)
        if self.silu:
            y = jax.nn.silu(y)
        return y.astype(x.dtype), new_state

    def _last(self, padded: Array, lengths: Array | None) -> Array:
        """The last `size - 1` inputs before each row's end."""
        if lengths is None:
            return padded[:, padded.shape[1] - (self.size - 1) :]
        rows = lengths[:, None] + jnp.arange(self.size - 1, dtype=lengths.dtype)[None, :]
        rows = rows.reshape(*rows.shape, *(1,) * (padded.ndim - 2))
        return jnp.take_along_axis(padded, rows, axis=1)


def _zero_unless(keep: Array, x: Array) -> Array:
    keep = keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))
    return jnp.where(keep, x, jnp.zeros_like(x))
