"""Bytes that the baselines' layers leave from the forward to the backward pass on a GPU.

The terms are the arrays that XLA keeps between the two passes in its plan for an H100, in units of
the layer's sizes, and the largest temporary arrays of the backward pass. `tests/sizing/` compares
their sums with XLA's plans.
"""

from typing import NamedTuple

from e88_jax.mixers.base import DTYPE_BYTES, Activations, Execution

CHUNK = 64
"""Tokens of a chunk, in the chunked forms and in the kernels."""
KERNEL_HEADS = frozenset(
    [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 256), (256, 512)]
)
"""Rows and columns of a head's state that the kernels of jax-linear-attention take."""
_WIDE = DTYPE_BYTES["float32"]


class Sizes(NamedTuple):
    """Sizes of a linear recurrence."""

    groups: int
    """Heads of q and k."""
    heads: int
    """Heads of v and of the state."""
    n_key: int
    n_value: int

    @property
    def keys(self) -> int:
        """Elements of q, or of k, of a token."""
        return self.groups * self.n_key

    @property
    def values(self) -> int:
        """Elements of v of a token."""
        return self.heads * self.n_value

    @property
    def state(self) -> int:
        """Elements of the states."""
        return self.heads * self.n_key * self.n_value

    def by_kernels(self, execution: Execution, heads: frozenset[tuple[int, int]]) -> bool:
        """Whether kernels, which take these heads, are asked for and take the call."""
        asked = execution.implementation == "mosaic_gpu" and execution.dtype == "bfloat16"
        return asked and (self.n_key, self.n_value) in heads


def _narrow(execution: Execution) -> int:
    """Bytes of a number in the compute dtype."""
    return DTYPE_BYTES[execution.dtype or "float32"]


def gated_deltanet(sizes: Sizes, length: int, execution: Execution) -> Activations:
    """Bytes of a Gated DeltaNet layer."""
    narrow, (keys, values, state) = _narrow(execution), (sizes.keys, sizes.values, sizes.state)
    heads = sizes.heads
    matmuls = narrow * (2 * keys + 2 * values + 2 * heads)  # q, k, v, gate, decay, write gate
    # q and k before and after their norm; v, out, and what the output projection reads.
    others = narrow * (4 * keys + 3 * values)
    if sizes.by_kernels(execution, KERNEL_HEADS):
        inverses = narrow * heads * CHUNK  # of the chunks' triangles
        return Activations(matmuls, others + inverses, 0, 2 * narrow * state // CHUNK)
    if execution.implementation == "scan":
        return _scan(matmuls, others, sizes, length, execution)
    others += _WIDE * (5 * values + 2 * keys + heads * sizes.n_key)
    working = _WIDE * (values + state // CHUNK)
    return Activations(matmuls, others, _states(sizes, length, CHUNK), working)


def mamba2(sizes: Sizes, length: int, execution: Execution) -> Activations:
    """Bytes of a Mamba2 layer."""
    narrow, (keys, values, state) = _narrow(execution), (sizes.keys, sizes.values, sizes.state)
    heads = sizes.heads
    matmuls = narrow * (2 * keys + 2 * values + heads)  # z, x, B, C, dt
    if sizes.by_kernels(execution, frozenset(x for x in KERNEL_HEADS if max(x) <= 128)):
        others = narrow * (4 * values + 2 * keys) + _WIDE * (values + 6 * keys)
        working = narrow * (state // CHUNK + 2 * values) + _WIDE * values
        return Activations(matmuls, others, 0, working)
    others = narrow * (2 * values + 2 * keys)
    if execution.implementation == "scan":
        return _scan(matmuls, others, sizes, length, execution)
    triangles = _WIDE * heads * CHUNK
    working = _WIDE * values + 4 * triangles
    states = _states(sizes, length, CHUNK)
    return Activations(matmuls, others + _WIDE * 7 * values, states, working)


def _states(sizes: Sizes, length: int, interval: int) -> int:
    """A state every so many steps, of a sequence."""
    return _WIDE * -(-length // interval) * sizes.state


def _scan(
    matmuls: int, others: int, sizes: Sizes, length: int, execution: Execution
) -> Activations:
    """A linear recurrence step by step: its inputs, with the keys of each head, and a state every
    few steps."""
    keys = sizes.keys
    if sizes.heads > sizes.groups:
        keys += sizes.heads * sizes.n_key
    inputs = _narrow(execution) * 2 * (keys + sizes.values)
    states = _states(sizes, length, execution.saved_state_interval)
    return Activations(matmuls, others + inputs, states)


def attention(
    queries: int, keys: int, heads: int, norm: bool, length: int, execution: Execution, fused: bool
) -> Activations:
    """Bytes of an attention layer.

    Args:
        queries, keys: elements of q, and of k or v, of a token.
        heads: of queries.
        norm: whether q and k are normalised.
        length: tokens of a sequence.
        execution: of the model.
        fused: whether cuDNN's fused attention takes the heads.
    """
    narrow = _narrow(execution)
    matmuls = narrow * (queries + 2 * keys)
    others = narrow * queries + _WIDE * heads  # the output, and what divides the softmax
    if norm:  # q and k before and after norm and RoPE; else after RoPE alone
        others += narrow * (queries + keys) + _WIDE * 2 * heads
    if fused and execution.implementation == "mosaic_gpu" and execution.dtype == "bfloat16":
        return Activations(matmuls, others, 0)
    weights = heads * length
    # The weights in float32, and in the compute dtype.
    return Activations(matmuls, others + (_WIDE + narrow) * weights, 0, _WIDE * weights)


def lstm(width: int) -> Activations:
    """Bytes of an LSTM layer: in float32, the matmuls of input and output, and five arrays of
    gates and cells."""
    return Activations(*(_WIDE * width * n for n in (8, 5, 0, 10)))
