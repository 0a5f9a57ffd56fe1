"""Causal depthwise short convolution with a state for decoding."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.nn import initializers

from e88_jax.documents import document_starts
from e88_jax.meshes import named_axes
from e88_jax.precision import wide, wide_dtype
from e88_jax.typed import stored, vjp
from pallas_kernels import target


class ShortConv(nnx.Module):
    """Depthwise convolution over time in which token t sees tokens t - size + 1 to t.

    Args:
        channels: axes of a token's input, heads first, such as `(H, 2N + V)`.
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
        taps = init(rngs.params(), (size, *channels), jnp.float32)
        axes = "heads", *[None] * (len(channels) - 1)
        self.taps = nnx.Param(taps, **named_axes(None, *axes))
        initial = None
        if bias:
            largest = size**-0.5
            initial = jax.random.uniform(rngs.params(), channels, jnp.float32, -largest, largest)
        self.bias = None if initial is None else nnx.Param(initial, **named_axes(*axes))

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
        padded = jnp.concatenate([_flat(state, 2), _flat(x, 2)], axis=1)
        new_state, documents = self._last(padded, lengths), None
        if segment_ids is not None:
            document = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
            before = jnp.zeros((document.shape[0], self.size - 1), jnp.int32)
            documents = jnp.concatenate([before, document], axis=1)
            of_state = self._last(documents, lengths)
            new_state = _zero_unless(of_state == of_state[:, -1:], new_state)
        bias = None if self.bias is None else _flat(self.bias[...], 0)
        convolve = _convolve_on_gpu if target.current().platform == "gpu" else _convolve
        y: Array = convolve(self.silu, padded, _flat(self.taps[...], 1), bias, documents)
        return y.reshape(x.shape), new_state.reshape(state.shape)

    def _last(self, padded: Array, lengths: Array | None) -> Array:
        """The last `size - 1` inputs before each row's end."""
        if lengths is None:
            return padded[:, padded.shape[1] - (self.size - 1) :]
        rows = lengths[:, None] + jnp.arange(self.size - 1, dtype=lengths.dtype)[None, :]
        rows = rows.reshape(*rows.shape, *(1,) * (padded.ndim - 2))
        return jnp.take_along_axis(padded, rows, axis=1)


def _convolve(
    silu: bool, padded: Array, taps: Array, bias: Array | None, documents: Array | None
) -> Array:
    """The convolution of `padded` `[B, size - 1 + T, C]`, `[B, T, C]`, in its dtype; `documents`
    `[B, size - 1 + T]` are those of the inputs."""
    y = _preactivation(padded, taps, bias, documents)
    return (jax.nn.silu(y) if silu else y).astype(padded.dtype)


def _preactivation(
    padded: Array, taps: Array, bias: Array | None, documents: Array | None
) -> Array:
    """The convolution before SiLU, in float32 (float64 for float64)."""
    y = jnp.asarray(
        sum(
            taps[None, None, tap].astype(wide_dtype(padded.dtype)) * wide(inputs)
            for tap, inputs in enumerate(_reached(padded, documents, len(taps)))
        )
    )
    return y if bias is None else y + bias[None, None].astype(y.dtype)


def _reached(padded: Array, documents: Array | None, size: int) -> list[Array]:
    """The inputs that each tap sees, `[B, T, C]`; zeros in other documents."""
    time = padded.shape[1] - (size - 1)
    reached = [padded[:, tap : tap + time] for tap in range(size)]
    if documents is None:
        return reached
    return [_zero_unless(same, x) for same, x in zip(_same(documents, size), reached, strict=True)]


def _same(documents: Array, size: int) -> list[Array]:
    """Whether a token and the input that each of its taps sees are of one document."""
    time = documents.shape[1] - (size - 1)
    own = documents[:, size - 1 :]
    return [documents[:, tap : tap + time] == own for tap in range(size)]


def _convolve_forward(silu: bool, *arguments: Any) -> tuple[Array, Any]:
    return _convolve(silu, *arguments), arguments


def _convolve_backward(silu: bool, arguments: Any, d_out: Array) -> Any:
    padded, taps, bias, documents = arguments
    size = len(taps)
    d_y = wide(stored(d_out))
    if silu:
        _, pullback = vjp(jax.nn.silu, _preactivation(padded, taps, bias, documents))
        (d_y,) = pullback(d_y)
    d_y = stored(d_y.astype(padded.dtype))
    reached = _reached(padded, documents, size)
    d_taps = _totals([wide(d_y) * wide(x) for x in reached])
    d_bias = None if bias is None else _totals([wide(d_y)])[0].astype(bias.dtype)
    d_padded: Any = 0
    for tap in range(size):  # of the token at t the input at t + tap
        of_tap = d_y if documents is None else _zero_unless(_same(documents, size)[tap], d_y)
        of_tap = wide(lax.pad(of_tap, jnp.zeros((), d_y.dtype), _ends(tap, size - 1 - tap)))
        d_padded += taps[None, None, tap].astype(of_tap.dtype) * of_tap
    return d_padded.astype(padded.dtype), d_taps.astype(taps.dtype), d_bias, None


_PIECES = range(128, 31, -1)
"""Steps of a piece: the first of them that divides T, else T."""


def _totals(arrays: list[Array]) -> Array:
    """The sums of arrays `[B, T, C]` over rows and time, `[len(arrays), C]`, by pieces of time.

    XLA divides a reduction of many steps so, but gives one of up to 4,096 only as many blocks of a
    GPU as C fills: twice the training step of a model on 32 sequences of 128 tokens. Pieces are
    stored before `stack`, which XLA otherwise fuses with the reduction to a slower kernel.
    """
    rows, time, channels = arrays[0].shape
    piece = next((n for n in _PIECES if time % n == 0), time)
    pieces = [x.reshape(rows * (time // piece), piece, channels) for x in arrays]
    return jnp.sum(jnp.stack([stored(jnp.sum(x, axis=1)) for x in pieces]), axis=1)


def _ends(before: int, after: int) -> list[tuple[int, int, int]]:
    """Padding of `[B, T, C]` along T."""
    return [(0, 0, 0), (before, after, 0), (0, 0, 0)]


_convolve_on_gpu = cast(Any, jax.custom_vjp(_convolve, nondiff_argnums=(0,)))
_convolve_on_gpu.defvjp(_convolve_forward, _convolve_backward)
"""`_convolve` whose gradient in reverse mode stores the gradient before SiLU once, in the input's
dtype. XLA would store a float32 array for each tap: 3 % of a Gated DeltaNet's training step."""


def _flat(x: Array, axes: int) -> Array:
    """x with its channels, after so many other axes, as one axis: XLA would transpose more."""
    return x.reshape(*x.shape[:axes], -1)


def _zero_unless(keep: Array, x: Array) -> Array:
    keep = keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))
    return jnp.where(keep, x, jnp.zeros_like(x))
