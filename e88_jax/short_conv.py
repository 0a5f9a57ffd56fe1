"""Causal depthwise short convolution with a decoding state."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from e88_jax.precision import wide, wide_dtype


class ShortConv(nnx.Module):
    """Depthwise convolution over time in which token t sees tokens t - size + 1 to t.

    Args:
        channels: width of the input.
        size: taps per channel, at least 2.
        rngs: source of the initial weights, uniform in +-1 / sqrt(size) as PyTorch's Conv1d.
    """

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        self.channels = channels
        self.size = size
        init = initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1)
        # [size, channels]; the last tap multiplies the newest token.
        self.kernel = nnx.Param(init(rngs.params(), (size, channels), jnp.float32))

    def init_state(self, batch: int, dtype: jnp.dtype) -> Array:
        """The state before the first token: `[batch, size - 1, channels]` zeros."""
        return jnp.zeros((batch, self.size - 1, self.channels), dtype)

    def __call__(
        self, x: Array, state: Array, document: Array | None, lengths: Array | None = None
    ) -> tuple[Array, Array]:
        """Convolves `x` `[B, T, channels]`.

        Args:
            x: the input.
            state: the size - 1 inputs before it, `[B, size - 1, channels]` in x's dtype.
            document: which document each token is in, `[B, T]`, counted from 0 for the one that
                `state` belongs to. Taps do not reach into another document. None: all in one.
            lengths: tokens of each row, `[B]`; None: T.

        Returns:
            The output, of x's shape and dtype, and the state after each row's last token.
        """
        time = x.shape[1]
        padded = jnp.concatenate([state, x], axis=1)
        reached = [padded[:, tap : tap + time] for tap in range(self.size)]
        new_state = self._last(padded, lengths)
        if document is not None:
            documents = jnp.pad(document, ((0, 0), (self.size - 1, 0)))
            reached = [
                _zero_unless(documents[:, tap : tap + time] == document, inputs)
                for tap, inputs in enumerate(reached)
            ]
            of_state = self._last(documents, lengths)
            new_state = _zero_unless(of_state == of_state[:, -1:], new_state)
        taps = self.kernel[...].astype(wide_dtype(x.dtype))
        y = sum(taps[None, None, tap] * wide(inputs) for tap, inputs in enumerate(reached))
        return jnp.asarray(y).astype(x.dtype), new_state

    def _last(self, padded: Array, lengths: Array | None) -> Array:
        """The last `size - 1` inputs of each row, or those before its end."""
        if lengths is None:
            return padded[:, padded.shape[1] - (self.size - 1) :]
        rows = lengths[:, None] + jnp.arange(self.size - 1, dtype=lengths.dtype)[None, :]
        rows = rows.reshape(*rows.shape, *(1,) * (padded.ndim - 2))
        return jnp.take_along_axis(padded, rows, axis=1)


def _zero_unless(keep: Array, x: Array) -> Array:
    return jnp.where(keep[..., None], x, jnp.zeros_like(x))
