"""Layers over chunks of time as a wavefront: a layer runs a chunk beside the layer below it, which
runs the next chunk (wavefront: `docs/references.md`)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Layer = TypeVar("Layer")
Tree = TypeVar("Tree")


class ChunkInputs(NamedTuple):
    """Documents and lengths of the rows in each chunk, along axis 0: every layer takes them."""

    segment_ids: Array | None  # [n, B, T / n]
    lengths: Array | None  # [n, B]: tokens of the chunk
    continues: Array | None  # [n, B]: whether it goes on in the document of the chunk before

    @classmethod
    def cut(cls, segment_ids: Array | None, lengths: Array | None, n: int, size: int) -> Self:
        """n chunks of `size` tokens each, from ids `[B, T]` and lengths `[B]`."""
        if lengths is not None:
            starts = size * jnp.arange(n, dtype=jnp.int32)
            lengths = jnp.clip(lengths.astype(jnp.int32)[None] - starts[:, None], 0, size)
        if segment_ids is None:
            return cls(None, lengths, None)
        segment_ids = cut(segment_ids, n)
        same = segment_ids[1:, :, 0] == segment_ids[:-1, :, -1]
        if lengths is not None:  # past its end a row keeps its state
            same |= lengths[1:] == 0
        return cls(segment_ids, lengths, jnp.concatenate([jnp.ones_like(same[:1]), same]))

    def starting_state(self, state: Tree, init_state: Callable[[], Tree]) -> Tree:
        """The state of a layer before a chunk (whose arrays lack axis 0 here), from that after the
        chunk before."""
        if self.continues is None:
            return state
        kept = self.continues

        def select(state: Array, initial: Array) -> Array:
            return jnp.where(kept.reshape(-1, *[1] * (state.ndim - 1)), state, initial)

        return jax.tree.map(select, state, init_state())


def cut(x: Array, n: int) -> Array:
    """`[n, B, T / n, ...]` of x `[B, T, ...]`."""
    batch, time, *sizes = x.shape
    return jnp.swapaxes(x.reshape(batch, n, time // n, *sizes), 0, 1)


def joined(x: Array) -> Array:
    """`[B, T, ...]` of x `[n, B, T / n, ...]`."""
    n, batch, size, *sizes = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(batch, n * size, *sizes)


def wavefront(
    run: Callable[[Sequence[Layer], Array, Tree, ChunkInputs], tuple[Array, Tree]],
    layers: Sequence[Layer],
    x: Array,
    states: Sequence[Tree],
    others: ChunkInputs,
) -> tuple[Array, tuple[Tree, ...]]:
    """Runs all layers over all chunks, in `len(layers) + n - 1` waves.

    A wave has all layers and chunks whose numbers add up to its own. Each has waited for the layer
    below and for the chunk before.

    Args:
        run: from layers and, of each, input, state and others along axis 0, to outputs and states.
        layers: first layer first.
        x: input of the first layer, n chunks along axis 0.
        states: the state of each layer before the first chunk.
        others: of all chunks.

    Returns:
        The output of the last layer, chunks along axis 0, and the last state of each layer.
    """
    n_layers, n_chunks = len(layers), len(x)
    inputs, in_wave = x[:0], _part(stacked(states[:1]), slice(0))
    outputs: list[Array] = []
    final: list[Tree] = []
    for wave in range(n_layers + n_chunks - 1):
        first, last = max(0, wave - n_layers + 1), min(wave, n_chunks - 1)  # chunks
        if wave < n_chunks:
            inputs = jnp.concatenate([inputs, x[wave : wave + 1]])
        if wave < n_layers:
            in_wave = _joined(stacked(states[wave : wave + 1]), in_wave)
        running = [layers[wave - chunk] for chunk in range(first, last + 1)]
        inputs, in_wave = run(running, inputs, in_wave, _part(others, slice(first, last + 1)))
        # Outputs are the next wave's inputs one layer up, and states its states one chunk on: the
        # arrays stay as they are but for what enters at one end and leaves at the other.
        if wave >= n_layers - 1:
            outputs.append(inputs[:1])
            inputs = inputs[1:]
        if last == n_chunks - 1:
            final.append(_part(in_wave, -1))
            in_wave = _part(in_wave, slice(-1))
    return jnp.concatenate(outputs), tuple(final)


def stacked(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one, along a new axis 0 of their arrays."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _joined(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)


def _part(tree: Tree, chunks: slice | int) -> Tree:
    def of(x: Array) -> Array:
        return x[chunks]

    return jax.tree.map(of, tree)
