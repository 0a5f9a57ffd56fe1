"""The language model: embedding, E88 layers with residual connections, tied logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from e88_jax.checks import (
    as_integers,
    as_lengths,
    require_instance,
    require_range,
    require_rngs,
    shown,
)
from e88_jax.config import LMConfig, Remat
from e88_jax.documents import live_steps
from e88_jax.meshes import call_with_automatic_axes, explicit_mesh
from e88_jax.mixer import NORM_EPSILON, E88Mixer, MixerState
from e88_jax.precision import compute_dtype, wide_dtype
from e88_jax.projection import Projection

LMState = tuple[MixerState, ...]
"""The state of each layer, first layer first."""


class ChannelMixer(nnx.Module):
    """SwiGLU: `W_down(silu(W_gate x) * W_up x)`, without biases (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        def linear(n_in: int, n_out: int) -> Projection:
            init = initializers.xavier_uniform()
            return Projection(n_in, n_out, dtype=dtype, kernel_init=init, rngs=rngs)

        self.gate_proj = linear(dim, hidden)
        self.up_proj = linear(dim, hidden)
        self.down_proj = linear(hidden, dim)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """`x + mixer(rmsnorm(x))`, then the same with the channel mixer if there is one."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        dim = config.layer.dim
        self.norm = nnx.RMSNorm(dim, epsilon=NORM_EPSILON, rngs=rngs)
        self.mixer = E88Mixer(config.layer, rngs=rngs)
        self.has_channel_mixer = config.channel_mixer_dim is not None
        if config.channel_mixer_dim is not None:
            self.channel_norm = nnx.RMSNorm(dim, epsilon=NORM_EPSILON, rngs=rngs)
            self.channel_mixer = ChannelMixer(
                dim, config.channel_mixer_dim, compute_dtype(config.layer.dtype), rngs=rngs
            )

    def __call__(
        self,
        x: Array,
        state: MixerState | None,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, MixerState]:
        y, state = self.mixer(self.norm(x), state, segment_ids, lengths=lengths)
        x += y.astype(x.dtype)
        if self.has_channel_mixer:
            x += self.channel_mixer(self.channel_norm(x)).astype(x.dtype)
        return x, state


_REMAT_POLICIES = {
    "recurrence": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layer": jax.checkpoint_policies.nothing_saveable,
}


def _run(block: Block, remat: Remat, *inputs: Any) -> tuple[Array, MixerState]:
    """`block(*inputs)`, of which the backward pass makes again what `remat` says.

    `nnx.remat` would not do: it fails in a loop around which the model was made.
    """
    if remat == "none":
        return block(*inputs)
    graphdef, params = nnx.split(block)

    @functools.partial(jax.checkpoint, policy=_REMAT_POLICIES[remat])
    def run(params: nnx.State, *inputs: Any) -> tuple[Array, MixerState]:
        return nnx.merge(graphdef, params)(*inputs)

    return run(params, *inputs)


class E88LM(nnx.Module):
    """An E88 language model; `logits, state = model(tokens, state, segment_ids)`.

    One call serves training (no state), stateful truncated backpropagation (the state of the window
    before, no gradient through it unless the caller keeps it) and decoding (T = 1).

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
        self.dtype = compute_dtype(config.layer.dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.layer.dim,
            embedding_init=initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.RMSNorm(config.layer.dim, epsilon=NORM_EPSILON, rngs=rngs)

    def init_state(self, batch: int) -> LMState:
        """The state before the first token: zeros for each of `batch` rows.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        return tuple(block.mixer.init_state(batch) for block in self.blocks)

    def __call__(
        self,
        tokens: Array,
        state: LMState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, LMState]:
        """Next-token logits.

        Args:
            tokens: ids `[B, T]`, integers from 0 to vocab_size - 1. Others are refused where they
                can be seen for nothing: outside of `jax.jit`, and on a CPU or in a NumPy array.
                Else the logits are NaN for a larger id, and negative ones count from the
                vocabulary's end.
            state: what the call before returned, or `init_state(B)`; None starts from zeros.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right
                with any ids: the state is that after a row's own last token; logits after it mean
                nothing. None: T.

        Returns:
            `(logits, state)`: logits `[B, T, vocab_size]` float32.

        Raises:
            TypeError: an argument of another type.
            ValueError: tokens are not `[B, T]` integers of the vocabulary, or the state, the ids or
                the lengths do not go with them.
        """
        given, tokens = tokens, as_integers("tokens", tokens, "[B, T]")
        if segment_ids is not None:
            segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", tokens.shape)
        if lengths is not None:
            lengths = as_lengths(lengths, *tokens.shape)
        require_range("tokens", given, 0, self.config.vocab_size - 1, lengths)
        if state is not None:
            is_sequence = isinstance(state, (tuple, list)) and not isinstance(state, MixerState)
            if not is_sequence or len(state) != len(self.blocks):
                raise (ValueError if is_sequence else TypeError)(
                    f"state must be a tuple of {len(self.blocks)} MixerStates, one for each layer, "
                    f"got {shown(state)}."
                )
            for i, (block, layer_state) in enumerate(zip(self.blocks, state, strict=True)):
                block.mixer.check_state(layer_state, tokens.shape[0], f"state[{i}]")
            state = tuple(state)
        arguments = tokens, state, segment_ids, lengths
        if explicit_mesh((*arguments, self.embed.embedding[...])) is None:
            return self._compute(*arguments)
        of_state = tuple(MixerState("b h", "b") for _ in self.blocks)  # pyright: ignore[reportArgumentType]
        axes = "b t", None if state is None else of_state, "b t", "b"
        return call_with_automatic_axes(
            E88LM._compute, self, arguments, axes, results=("b t", of_state)
        )

    def _compute(
        self,
        tokens: Array,
        state: LMState | None,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, LMState]:
        """As `__call__`, of arguments that are checked."""
        if lengths is not None:
            # The embedding of an id out of range is NaN.
            tokens = jnp.where(live_steps(lengths, tokens.shape[1]), tokens, 0)
        x = self.embed(tokens)
        layer_states = [None] * len(self.blocks) if state is None else state
        new_state = []
        for block, layer_state in zip(self.blocks, layer_states, strict=True):
            x, layer_state = _run(block, self.config.remat, x, layer_state, segment_ids, lengths)
            new_state.append(layer_state)
        dtype = self.dtype
        logits = jnp.einsum(
            "btd,vd->btv",
            self.norm(x).astype(dtype),
            self.embed.embedding[...].astype(dtype),
            preferred_element_type=wide_dtype(dtype),
        )
        return logits, tuple(new_state)


def count_params(model: nnx.Module) -> int:
    """Number of parameters (elements) of a built module.

    Raises:
        TypeError: no module; of a configuration, `e88_jax.sizing.count_params` tells.
    """
    needs = "a built module (sizing.count_params takes a configuration)"
    require_instance("model", model, nnx.Module, needs)
    return sum(param.size for param in jax.tree.leaves(nnx.state(model, nnx.Param)))


def weight_decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to, for optax's `mask` and `weight_decay_mask`.

    True for the weights of projections, convolutions and the embedding; False for A_log, dt_bias,
    norms and the other per-head or per-channel numbers.

    Args:
        params: `nnx.state(model, nnx.Param)` or a tree of the same paths.

    Returns:
        A tree of the same structure with a bool for each parameter.

    Raises:
        TypeError: no tree.
    """
    if params is None or jax.tree_util.all_leaves([params]):
        raise TypeError(
            f"params must be a tree of parameters, such as nnx.state(model, nnx.Param), "
            f"got {shown(params)}."
        )

    def decays(path: tuple[Any, ...], _: Array) -> bool:
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        return any(name in ("kernel", "embedding") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)
