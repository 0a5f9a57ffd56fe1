"""Causal softmax attention with rotary positions, grouped heads and a cache of bounded size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export, lax
from jax.nn import initializers

from e88_jax import kernels
from e88_jax.checks import require_instance, require_int, require_rngs
from e88_jax.documents import document_starts, live_steps
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import AttentionConfig
from e88_jax.mixers.call import call_checked, check_batch
from e88_jax.precision import NORM_EPSILON, compute_dtype, wide, wide_dtype
from e88_jax.projection import FROM_DIM, TO_DIM, AnyProjection, Projection
from e88_jax.typed import einsum
from pallas_kernels import target

CUDNN_MAX_HEAD_DIM = 128
"""Largest head of cuDNN's fused attention, forward and backward, on every GPU that has it."""
CUDNN_HEAD_DIM_MULTIPLE = 8
"""Divisor of the heads of cuDNN's fused attention: 16 bytes of bfloat16."""


class AttentionState(NamedTuple):
    """The state of a layer between calls: a ring buffer of C tokens of the current document.

    The token at position p of its document is in slot p mod C. A slot without a token is zeros.
    """

    keys: Array
    """Keys after norm and RoPE, `[B, C, G, D]` in the compute dtype."""
    values: Array
    """Values, `[B, C, G, D]` in the compute dtype."""
    position: Array
    """Tokens of the current document so far, `[B]` int32."""

    AXES = ("b c h", "b c h", "b")
    """Names of the first axes of each array: b the batch, h the heads."""


export.register_namedtuple_serialization(AttentionState, serialized_name="e88_jax.AttentionState")


class _Places(NamedTuple):
    """Where the tokens of a call stand in their documents; `[1, T]` where all rows agree."""

    begins: Array | None
    """Step at which the token's document begins, `[B, T]` int32; 0 if it continues the state. None
    for one document."""
    positions: Array
    """Position of the token in its document, `[B, T]` int32."""


class AttentionMixer(nnx.Module):
    """One layer of causal softmax attention; `y, state = mixer(x, state, segment_ids)`.

    For each token at position p of its document, with x `[dim]` its input, heads `h` and the heads
    `g(h)` of keys and values that they share (GQA: `docs/references.md`):

        q, k = rope(rmsnorm(W_q[h] x), p), rope(rmsnorm(W_k[g] x), p)   qk_norm; else without norm
        o    = sum_s softmax_s(q . k_s / sqrt(D)) v_s,  v = W_v[g] x    over the tokens s it sees
        y    = sum_h W_o[h] o

    RoPE (`docs/references.md`) turns the pairs `(x[i], x[i + D/2])`, halves as in GPT-NeoX and
    Llama, by the angle `p * rope_base ** (-2i / D)`, computed in float32. The norm's learned weight
    `[D]` is one for all heads of q, and one for all of k (QK norm: `docs/references.md`).

    A token sees itself and the tokens before it in its document: `window - 1` of them with a
    window. Without one, a call without a state sees all of x, and a call with a state sees `C - 1`
    of them, C the size of its cache: once the cache is full the oldest tokens drop out, as in a
    window.

    Parameters are float32 and head-major: `W_q` is `[dim, H, D]`, `W_k` and `W_v` `[dim, G, D]`,
    `W_o` `[H, D, dim]`, each xavier-uniform as one matrix. No biases. Matmuls run in the compute
    dtype; norm, RoPE and softmax in float32, or float64 for float64. On a GPU in bfloat16 a call
    without state and documents runs by cuDNN's fused attention, all others by XLA.

    Args:
        config: sizes and options.
        dim: width of x.
        execution: compute dtype, and implementation: `scan` and `chunked` are XLA's.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: an argument of another type.
        ValueError: dim is below 1.
    """

    def __init__(
        self,
        config: AttentionConfig,
        dim: int,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        *,
        rngs: nnx.Rngs,
    ):
        require_instance("config", config, AttentionConfig)
        require_instance("execution", execution, Execution)
        require_rngs(rngs)
        self.config, self.execution = config, execution
        self.dim = require_int("dim", dim)
        self.dtype = compute_dtype(execution.dtype)
        heads, head_dim = config.n_heads, config.head_dim

        def linear(n_in: tuple[int, ...], *n_out: int, axes: Any = FROM_DIM) -> AnyProjection:
            init = initializers.xavier_uniform()
            return Projection(n_in, n_out, dtype=self.dtype, kernel_init=init, rngs=rngs, axes=axes)

        def norm() -> nnx.RMSNorm | None:
            if not config.qk_norm:
                return None
            return nnx.RMSNorm(head_dim, epsilon=NORM_EPSILON, rngs=rngs)

        self.q = linear((dim,), heads, head_dim)
        self.k, self.v = (linear((dim,), config.kv_heads, head_dim) for _ in range(2))
        self.q_norm, self.k_norm = norm(), norm()
        self.output = linear((heads, head_dim), dim, axes=TO_DIM)

    def init_state(self, batch: int, context: int | None = None) -> AttentionState:
        """The state before the first token: zeros.

        Args:
            batch: rows.
            context: C, the most tokens that attention without a window remembers; one with a window
                ignores it and remembers those of the window.

        Raises:
            TypeError: an argument of another type.
            ValueError: a size below 1, or no context and no window.
        """
        check_batch(batch)
        size = self.config.window
        if size is None:
            if context is None:
                raise ValueError(
                    "context must be the most tokens that attention without a window remembers, "
                    f"such as init_state({batch}, context=2048), got None."
                )
            size = context if export.is_symbolic_dim(context) else require_int("context", context)
        shape = (batch, size, self.config.kv_heads, self.config.head_dim)
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return AttentionState(keys, values, jnp.zeros((batch,), jnp.int32))

    @property
    def needs_context(self) -> bool:
        """Whether `init_state` needs a context: there is no window."""
        return self.config.window is None

    def context_of(self, state: Any) -> int:
        """The context with which `init_state` makes a state of the given one's size; 1 for what is
        no state."""
        keys = getattr(state, "keys", None)
        shape: tuple[int, ...] = getattr(keys, "shape", ())
        return shape[1] if len(shape) > 1 and shape[1] != 0 else 1

    def __call__(
        self,
        x: Array,
        state: AttentionState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, AttentionState]:
        """Mixes over time.

        Args:
            x: `[B, T, dim]`, any float dtype.
            state: what the call before returned, or `init_state`; None before the first token.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over, and positions start at 0. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right:
                the state is that after a row's own last token, and y after it is zeros. None: T.

        Returns:
            `(y, state)`: y `[B, T, dim]` in the compute dtype. The state's C is the window; without
            one it is that of the given state, or T.

        Raises:
            TypeError: an argument of another type.
            ValueError: x is not `[B, T, dim]` or empty, or the state, the ids or the lengths do not
                go with it.
        """
        arguments = x, state, segment_ids, lengths
        return call_checked(
            type(self)._mix, self, self.dim, AttentionState, *arguments, takes_no_state=True
        )

    def _mix(
        self,
        x: Array,
        state: AttentionState | None,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, AttentionState]:
        """`__call__` with checked arguments."""
        live = None if lengths is None else live_steps(lengths, x.shape[1])[:, :, None]
        places = _places(x.shape[1], state, segment_ids)
        q, k, v = wide(self.q(x)), wide(self.k(x)), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        positions, base = places.positions, self.config.rope_base
        q, k = (rope(y, positions, base).astype(self.dtype) for y in (q, k))
        out = self._attend(q, k, v, state, places)
        if live is not None:
            out = jnp.where(live[..., None], out, jnp.zeros_like(out))
        return self.output(out), self._after(k, v, state, places, lengths)

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: AttentionState | None,
        places: _Places,
    ) -> Array:
        """Weighted values `[B, T, H, D]` of queries `[B, T, H, D]`, and keys and values
        `[B, T, G, D]`."""
        if state is None and places.begins is None:
            try:
                return self._fused(q, k, v)
            except NotImplementedError as refusal:
                kernels.log_fallback("attention", refusal)
        reach = self.config.window if state is None else state.keys.shape[1]
        seen = _seen(k.shape[1], places, reach)
        if state is not None:
            seen = jnp.broadcast_to(seen, (k.shape[0], *seen.shape[1:]))
            seen = jnp.concatenate([_seen_in_cache(state, places), seen], axis=2)
            k = jnp.concatenate([state.keys, k], axis=1)
            v = jnp.concatenate([state.values, v], axis=1)
        return attend(q, k, v, seen)

    def _fused(self, q: Array, k: Array, v: Array) -> Array:
        """Causal attention within x by cuDNN.

        Raises:
            NotImplementedError: cuDNN does not run on the target, or does not take the call.
        """
        config = self.config
        if self.execution.implementation not in (None, "mosaic_gpu"):
            raise kernels.NotWorthIt("is not asked for")
        if target.current().platform != "gpu" or q.dtype != jnp.bfloat16:
            raise kernels.NotWorthIt("needs a GPU and bfloat16")
        time: Any = q.shape[1]
        if export.is_symbolic_dim(time) or time == 1:
            raise kernels.NotWorthIt("is for several tokens, as many at every call")
        if config.head_dim > CUDNN_MAX_HEAD_DIM or config.head_dim % CUDNN_HEAD_DIM_MULTIPLE:
            raise NotImplementedError(
                f"needs a head_dim that is a multiple of {CUDNN_HEAD_DIM_MULTIPLE} and at most "
                f"{CUDNN_MAX_HEAD_DIM}, got {config.head_dim}"
            )
        window = config.window if config.window is not None and config.window < time else None
        return kernels.call(_cudnn_attention, q, k, v, window=window)

    def _after(
        self,
        k: Array,
        v: Array,
        state: AttentionState | None,
        places: _Places,
        lengths: Array | None,
    ) -> AttentionState:
        """The state after each row's last token."""
        batch, time = k.shape[:2]
        before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
        positions = jnp.broadcast_to(places.positions, (batch, time))
        if lengths is None:
            count, position = time, positions[:, -1] + 1
        else:
            count = lengths.astype(jnp.int32)
            last = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
            position = jnp.where(count > 0, last + 1, before)
        context = time if state is None else state.keys.shape[1]
        held = _held(position, self.config.window or context)
        # The step of a held token; below 0 for one of an earlier call, whose slot is the same.
        step = held + (count - position)[:, None]
        is_held, is_new = (x[:, :, None, None] for x in (held >= 0, step >= 0))
        source = jnp.clip(step, 0, time - 1)[:, :, None, None]

        def stored(x: Array, cache: Array | None) -> Array:
            new = jnp.take_along_axis(x, source, axis=1)
            old = jnp.zeros_like(new) if cache is None else cache
            return jnp.where(is_held, jnp.where(is_new, new, old), jnp.zeros_like(new))

        keys, values = (None, None) if state is None else (state.keys, state.values)
        return AttentionState(stored(k, keys), stored(v, values), position)

    def for_inference(self) -> "AttentionMixer":
        """The layer with its projections laid out for decoding; this one stays as it is."""
        mixer = nnx.clone(self)  # other variables, of the same arrays
        mixer.q, mixer.k = self.q.for_inference(), self.k.for_inference()
        mixer.v, mixer.output = self.v.for_inference(), self.output.for_inference()
        return mixer


def rope(x: Array, positions: Array, base: float) -> Array:
    """x with each pair `(x[i], x[i + D/2])` turned by the angle `position * base ** (-2i / D)`.

    Args:
        x: `[B, T, H, D]`, float32 or float64; angles are computed in its dtype.
        positions: `[B, T]` or `[1, T]` int32.
        base: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    exponents = jnp.arange(half, dtype=x.dtype) / half
    rates = jnp.asarray(base, x.dtype) ** -exponents
    angles = positions.astype(x.dtype)[:, :, None, None] * rates[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Softmax attention by XLA, its softmax in float32, or float64 for float64, for which
    `jax.nn.dot_product_attention` has float32 too. What is not finite spoils those alone that see
    it.

    Args:
        q: queries `[B, T, H, D]`.
        k, v: keys and values `[B, S, G, D]`; head h of q has head h // (H / G) of k.
        seen: keys that each query sees, `[B, T, S]` or `[1, T, S]` bool; at least one.

    Returns:
        `[B, T, H, D]` in the dtype of v.
    """
    batch, time, heads, head_dim = q.shape
    groups = k.shape[2]
    # A weight of 0 times NaN is NaN: what is not finite is zeros here, and NaN in the results.
    lost, bad = _not_finite(q), _not_finite(k) | _not_finite(v)
    q, k, v = (jnp.where(x, jnp.zeros_like(y), y) for x, y in ((lost, q), (bad, k), (bad, v)))
    spoilt = lost | jnp.any(seen & bad[:, None, :, 0, 0], axis=2)[:, :, None, None]
    q = q.reshape(batch, time, groups, heads // groups, head_dim)
    scores = einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=wide_dtype(q.dtype))
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = einsum("bgrts,bsgd->btgrd", weights, v).reshape(batch, time, heads, head_dim)
    return jnp.where(spoilt, jnp.asarray(jnp.nan, out.dtype), out)


def _not_finite(x: Array) -> Array:
    return ~jnp.all(jnp.isfinite(x), axis=(2, 3), keepdims=True)


def _cudnn_attention(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
    """Causal attention within x by cuDNN, through `jax.nn.dot_product_attention`.

    cuDNN takes an even number of tokens; one that is added comes last, and no other sees it.
    """
    time = q.shape[1]
    padding = ((0, 0, 0), (0, time % 2, 0), (0, 0, 0), (0, 0, 0))
    q, k, v = (lax.pad(x, jnp.zeros((), x.dtype), padding) for x in (q, k, v))
    before = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=before, implementation="cudnn"
    )
    return out[:, :time]


def _places(time: int, state: AttentionState | None, segment_ids: Array | None) -> _Places:
    """Begin of its document and position of each token."""
    steps = jnp.arange(time, dtype=jnp.int32)[None, :]
    before = jnp.zeros((1, 1), jnp.int32) if state is None else state.position[:, None]
    if segment_ids is None:
        return _Places(None, steps + before)
    begins = lax.cummax(jnp.where(document_starts(segment_ids), steps, 0), axis=1)
    return _Places(begins, steps - begins + jnp.where(begins == 0, before, 0))


def _seen(time: int, places: _Places, reach: int | None) -> Array:
    """The tokens of a call that each of them sees, `[B, T, T]` or `[1, T, T]` bool: of its document
    itself and those before it, `reach` in all if given."""
    steps = jnp.arange(time, dtype=jnp.int32)
    ago = steps[None, :, None] - steps[None, None, :]
    seen = ago >= 0
    if reach is not None:
        seen &= ago < reach
    if places.begins is not None:
        seen &= steps[None, None, :] >= places.begins[:, :, None]
    return seen


def _seen_in_cache(state: AttentionState, places: _Places) -> Array:
    """The slots of the cache that each token of a call sees, `[B, T, C]` bool."""
    context = state.keys.shape[1]
    held = _held(state.position, context)[:, None, :]
    seen = (held >= 0) & (places.positions[:, :, None] - held < context)
    if places.begins is not None:
        seen &= (places.begins == 0)[:, :, None]
    return seen


def _held(position: Array, context: int) -> Array:
    """Position of the token in each slot of a cache, `[B, C]`, after `position` `[B]` tokens; below
    0 for a slot without one."""
    last = position[:, None] - 1
    slots = jnp.arange(context, dtype=jnp.int32)[None, :]
    return last - (last - slots) % context
