"""The language model: embedding, mixers with residual connections, tied logits."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export
from jax.nn import initializers

from e88_jax.checks import (
    as_integers,
    as_lengths,
    as_positions,
    require_instance,
    require_range,
    require_rngs,
    shown,
)
from e88_jax.config import LMConfig
from e88_jax.documents import live_steps
from e88_jax.meshes import (
    call_with_automatic_axes,
    copied,
    explicit_mesh,
    named_axes,
    names_of,
    summed,
)
from e88_jax.mixers.base import MixerConfig, MixerState
from e88_jax.mixers.call import check_state, fresh_state
from e88_jax.precision import NORM_EPSILON, compute_dtype, wide_dtype
from e88_jax.projection import AnyProjection, Projection
from e88_jax.recomputation import SUM, run_layer, run_side_by_side, split_alike
from e88_jax.typed import einsum, named
from e88_jax.wavefront import ChunkInputs, cut, joined, wavefront

LMState = tuple[MixerState, ...]
"""The state of each layer, first layer first."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The devices that each compute a part of a layer's output, if there are several."""

    dtype: jnp.dtype
    """The compute dtype, in which they exchange."""
    axis: str | None = None
    """The mesh axis of a surrounding `jax.shard_map` that they are along; None for one device."""

    def enter(self, x: Array) -> Array:
        """Input of a part."""
        return x if self.axis is None else copied(x.astype(self.dtype), self.axis)

    def leave(self, y: Array) -> Array:
        """Output of the layer, of a part's. `remat` keeps it, as the backward pass would wait for
        the sum again."""
        return y if self.axis is None else named(summed(y, self.axis), SUM)


class ChannelMixer(nnx.Module):
    """SwiGLU (`docs/references.md`) of the normed input, `W_down(silu(W_gate x) * W_up x)`, without
    biases."""

    def __init__(self, config: LMConfig, hidden: int, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, compute_dtype(config.execution.dtype)

        def linear(n_in: int, n_out: int, *axes: str) -> AnyProjection:
            init = initializers.xavier_uniform()
            return Projection(
                (n_in,), (n_out,), dtype=dtype, kernel_init=init, rngs=rngs, axes=axes
            )

        self.norm = nnx.RMSNorm(dim, epsilon=NORM_EPSILON, rngs=rngs)
        self.gate_proj = linear(dim, hidden, "dim", "hidden")
        self.up_proj = linear(dim, hidden, "dim", "hidden")
        self.down_proj = linear(hidden, dim, "hidden", "dim")
        self.parts = Parts(dtype)

    def __call__(self, x: Array) -> Array:
        x = self.parts.enter(self.norm(x))
        return self.parts.leave(self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)))

    def prepare_for_inference(self) -> None:
        """Lays the weights out for decoding."""
        self.gate_proj = self.gate_proj.for_inference()
        self.up_proj = self.up_proj.for_inference()
        self.down_proj = self.down_proj.for_inference()


class Block(nnx.Module):
    """`x + mixer(rmsnorm(x))`, then the same with the channel mixer if there is one."""

    def __init__(self, config: LMConfig, mixer: MixerConfig, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(config.dim, epsilon=NORM_EPSILON, rngs=rngs)
        self.mixer = mixer.build(config.dim, config.execution, rngs=rngs)
        self.channel_mixer = (
            None
            if config.channel_mixer_dim is None
            else ChannelMixer(config, config.channel_mixer_dim, rngs=rngs)
        )
        self.parts = Parts(compute_dtype(config.execution.dtype))

    def divide_over(self, axis: str) -> None:
        """Turns the block into a device's part along a mesh axis, as `head_parallel.merge` says."""
        self.parts = dataclasses.replace(self.parts, axis=axis)
        for _, param in nnx.iter_graph(self.mixer):
            if isinstance(param, nnx.Param) and "heads" not in names_of(cast(Any, param)):
                param[...] = copied(cast(Array, param[...]), axis)  # of all heads
        if self.channel_mixer is not None:
            self.channel_mixer.parts = self.parts

    def __call__(
        self,
        x: Array,
        state: MixerState | None,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, MixerState]:
        of_call = {} if lengths is None else {"lengths": lengths}
        y, state = self.mixer(self.parts.enter(self.norm(x)), state, segment_ids, **of_call)
        x += self.parts.leave(y).astype(x.dtype)
        if self.channel_mixer is not None:
            x += self.channel_mixer(x).astype(x.dtype)
        return x, state


class LanguageModel(nnx.Module):
    """A language model of any mixers; `logits, state = model(tokens, state, segment_ids)`.

        x      = E[tokens]
        x      = x + mixer(rmsnorm(x))              depth times
        logits = E rmsnorm(x)                       E `[vocab_size, dim]`

    E is initially N(0, embedding_std^2). One call serves training (no state), stateful truncated
    backpropagation (the state of the window before, no gradient through it unless the caller keeps
    it) and decoding (T = 1).

    Args:
        config: sizes and options.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: another config, or no nnx.Rngs.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        require_instance("config", config, LMConfig)
        require_rngs(rngs)
        self.config = config
        self.dtype = compute_dtype(config.execution.dtype)
        init = initializers.normal(config.embedding_std)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.dim,
            embedding_init=init,
            embedding_metadata=named_axes(None, "dim"),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, mixer, rngs=rngs) for mixer in config.mixers])
        self.norm = nnx.RMSNorm(config.dim, epsilon=NORM_EPSILON, rngs=rngs)

    def init_state(self, batch: int, context: int | None = None) -> LMState:
        """The state of `batch` rows before the first token.

        Args:
            batch: rows.
            context: most tokens that attention without a window remembers; other layers ignore it.

        Raises:
            TypeError: an argument of another type.
            ValueError: a size below 1, or no context for a model that `needs_context`.
        """
        return tuple(block.mixer.init_state(batch, context) for block in self.blocks)

    @property
    def needs_context(self) -> bool:
        """Whether `init_state` needs a context: a layer is attention without a window."""
        return any(getattr(block.mixer, "needs_context", False) for block in self.blocks)

    def __call__(
        self,
        tokens: Array,
        state: LMState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, LMState]:
        """Next-token logits.

        Args:
            tokens: ids `[B, T]`, integers from 0 to vocab_size - 1. Others are refused where their
                values can be read at no cost: outside of `jax.jit`, on a CPU or in a NumPy array.
                Elsewhere a larger id gives NaN logits, and a negative one counts from the end of
                the vocabulary.
            state: what the call before returned, or `init_state(B)`; None starts from zeros.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right
                with any ids: the state is that after a row's own last token; logits after it mean
                nothing. None: T.
            positions: tokens of each row whose logits are wanted, `[B, N]` int32 from 0 to T - 1,
                in any order: with few of them a large vocabulary costs less. None: all.

        Returns:
            `(logits, state)`: logits `[B, T, vocab_size]` float32, or `[B, N, vocab_size]`.

        Raises:
            TypeError: an argument of another type.
            ValueError: tokens are not `[B, T]` integers of the vocabulary, or the state, the ids,
                the lengths or the positions do not go with them. With `remat` or `time_chunks`, a
                layer has variables that are no parameters; with the latter, layers differ in more
                than their weights.
        """
        given, tokens = tokens, as_integers("tokens", tokens, "[B, T]")
        if segment_ids is not None:
            segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", tokens.shape)
        if lengths is not None:
            lengths = as_lengths(lengths, *tokens.shape)
        if positions is not None:
            positions = as_positions(positions, *tokens.shape)
        require_range("tokens", given, 0, self.config.vocab_size - 1, lengths)
        if state is not None:
            state = self.check_state(state, tokens.shape[0])
        arguments = tokens, state, segment_ids, lengths, positions
        if explicit_mesh((*arguments, self.embed.embedding[...])) is None:
            return self._compute(*arguments)
        axes, results = ("b t", "b", "b t", "b", "b"), ("b t", "b")
        return call_with_automatic_axes(LanguageModel._compute, self, arguments, axes, results)

    def check_state(self, state: Any, batch: int) -> LMState:
        """The state as a tuple.

        Raises:
            TypeError, ValueError: it is no state of this model for `batch` rows.
        """
        is_sequence = type(state) in (tuple, list)
        if not is_sequence or len(state) != len(self.blocks):
            raise (ValueError if is_sequence else TypeError)(
                f"state must be a tuple of {len(self.blocks)} mixers' states, one for each layer, "
                f"such as init_state({batch}), got {shown(state)}."
            )
        for i, (block, layer_state) in enumerate(zip(self.blocks, state, strict=True)):
            check_state(f"state[{i}]", layer_state, block.mixer, batch)
        return tuple(state)

    def _compute(
        self,
        tokens: Array,
        state: LMState | None,
        segment_ids: Array | None,
        lengths: Array | None,
        positions: Array | None,
    ) -> tuple[Array, LMState]:
        """`__call__` with checked arguments."""
        if lengths is not None:
            # The embedding of an id out of range is NaN.
            tokens = jnp.where(live_steps(lengths, tokens.shape[1]), tokens, 0)
        x = self.embed(tokens)
        n_chunks = self._n_chunks(tokens.shape[1])
        run = self._run_layers if n_chunks == 1 else partial(self._run_wavefront, n_chunks)
        x, new_state = run(x, state, segment_ids, lengths)
        if positions is not None:
            x = jnp.take_along_axis(x, positions[:, :, None], axis=1)
        dtype = self.dtype
        logits = einsum(
            "btd,vd->btv",
            self.norm(x).astype(dtype),
            self.embed.embedding[...].astype(dtype),
            preferred_element_type=wide_dtype(dtype),
        )
        return logits, new_state

    def _run_layers(
        self, x: Array, state: LMState | None, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, LMState]:
        """All layers, one after the other."""
        layer_states = [None] * len(self.blocks) if state is None else state
        new_state: list[MixerState] = []
        for block, layer_state in zip(self.blocks, layer_states, strict=True):
            x, layer_state = run_layer(
                block, self.config.execution.remat, x, layer_state, segment_ids, lengths
            )
            new_state.append(layer_state)
        return x, tuple(new_state)

    def _n_chunks(self, time: int) -> int:
        """Chunks of a sequence of so many tokens."""
        n = self.config.execution.time_chunks
        return n if n > 1 and not export.is_symbolic_dim(time) and time % n == 0 else 1

    def _run_wavefront(
        self,
        n_chunks: int,
        x: Array,
        state: LMState | None,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, LMState]:
        """`_run_layers` by a wavefront over chunks of time."""
        graphdef, params = split_alike(self.blocks)
        batch, time, _ = x.shape

        def run(
            block: Block, x: Array, state: MixerState, inputs: ChunkInputs
        ) -> tuple[Array, MixerState]:
            state = inputs.starting_state(state, lambda: fresh_state(block.mixer, state, batch))
            return block(x, state, inputs.segment_ids, inputs.lengths)

        x, new_state = wavefront(
            partial(run_side_by_side, run, self.config.execution.remat, graphdef),
            params,
            cut(x, n_chunks),
            self.init_state(batch, time) if state is None else state,
            ChunkInputs.cut(segment_ids, lengths, n_chunks, time // n_chunks),
        )
        return joined(x), new_state

    def for_inference(self) -> "LanguageModel":
        """The model laid out for decoding; this one stays as it is.

        Input projections of a layer are one matmul. Weights of matmuls are cast to the compute
        dtype, which halves the bytes read per token in bfloat16, and on a GPU stored as
        `[n_out, n_in]`, for faster matrix-vector products. There a token may run by a kernel that
        cannot be differentiated.
        """
        model = nnx.clone(self)  # other variables, of the same arrays
        for block in model.blocks:
            block.mixer = block.mixer.for_inference()
            if block.channel_mixer is not None:
                block.channel_mixer.prepare_for_inference()
        return model
