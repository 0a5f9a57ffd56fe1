"""Sampling from a model with its state carried along: constant memory in the length."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from e88_jax.model import E88LM, LMState
from e88_jax.projection import Projection

BLOCK = 32
"""Tokens that a stream draws in one program."""


def filter_logits(logits: Array, temperature: Array, top_k: int | None, top_p: Array) -> Array:
    """Logits `[B, vocab]` of the distribution to sample from; -inf where a filter excludes.

    top_k keeps the k likeliest tokens, top_p then the smallest set of likeliest tokens that holds
    at least that probability (https://arxiv.org/abs/1904.09751); the likeliest always stays.
    """
    logits = logits / temperature
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    if top_k is not None:
        descending = jnp.where(rank < top_k, descending, -jnp.inf)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    within = (mass_before < top_p) | (top_p >= 1)  # rounding must not cut the tail off at 1
    kept = (rank == 0) | (within & jnp.isfinite(descending))
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def read_and_draw(
    graphdef: nnx.GraphDef[E88LM],
    params: nnx.State,
    state: LMState,
    tokens: Array,
    key: Array,
    temperature: Array,
    top_p: Array,
    *,
    top_k: int | None,
    greedy: bool,
) -> tuple[LMState, Array, Array]:
    """Reads `tokens` `[B, T]` from `state` and draws one more.

    Args:
        graphdef, params: `for_inference` of the model.

    Returns:
        The state, the token drawn `[B]` int32 and the key for those to come.
    """
    logits, state = nnx.merge(graphdef, params)(tokens, state)
    logits = logits[:, -1]
    key, step_key = jax.random.split(key)
    if greedy:
        drawn = jnp.argmax(logits, axis=-1)
    else:
        logits = filter_logits(logits, temperature, top_k, top_p)
        drawn = jax.random.categorical(step_key, logits)
    return state, drawn.astype(jnp.int32), key


_STATIC = ("graphdef", "top_k", "greedy")

prefill = jax.jit(read_and_draw, static_argnames=_STATIC, donate_argnames="state")
"""`read_and_draw` as one program, which consumes the state."""


@functools.partial(jax.jit, static_argnames=(*_STATIC, "length"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef[E88LM],
    params: nnx.State,
    state: LMState,
    token: Array,
    key: Array,
    temperature: Array,
    top_p: Array,
    *,
    top_k: int | None,
    greedy: bool,
    length: int,
) -> tuple[LMState, Array, Array]:
    """Draws `length` tokens one after the other, of which `token` `[B]` is the one before.

    One program, so that the device does not wait for the host at each; otherwise as `prefill`, the
    state included.

    Returns:
        The state, the tokens drawn `[B, length]` int32 and the key for those to come.
    """

    def one(carry: Any, _: None) -> tuple[Any, Array]:
        state, token, key = carry
        carry = read_and_draw(
            graphdef,
            params,
            state,
            token[:, None],
            key,
            temperature,
            top_p,
            top_k=top_k,
            greedy=greedy,
        )
        return carry, carry[1]

    (state, _, key), drawn = lax.scan(one, (state, token, key), length=length)
    return state, drawn.T, key


def for_inference(model: E88LM) -> tuple[nnx.GraphDef[E88LM], nnx.State]:
    """Graph and parameters of a model that computes the same, made to decode.

    What each layer reads from its input is one product. What is only multiplied with is in the
    dtype of the products, so that a step of decoding, which has to read all of it, reads half of
    the bytes where that is bfloat16; and on a GPU transposed, which a step reads faster. There a
    step of one token may be by a kernel that cannot be differentiated.
    """
    model = nnx.merge(*nnx.split(model))  # other variables, of the same arrays
    for block in model.blocks:
        block.mixer.join_projections()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Projection):
            module.prepare_for_inference()
        elif isinstance(module, nnx.Einsum):
            module.kernel = nnx.Param(module.kernel[...].astype(module.dtype))
    return nnx.split(model)


def generate_stream(
    model: E88LM,
    prompt: Array | np.ndarray,
    *,
    key: Array,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
) -> Iterator[np.ndarray]:
    """Draws tokens without end; the memory used does not grow.

    The prompt is read in one pass. The defaults are those of the original implementation.

    Args:
        model: the language model.
        prompt: ids `[B, T]`, integers, T at least 1.
        key: a JAX random key; the same key gives the same tokens.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens; None for all.
        top_p: sample among the likeliest tokens that together hold this probability, in (0, 1].

    Yields:
        The next token of each row, `[B]` int32.

    Raises:
        ValueError: a prompt that is empty or not of the vocabulary, or an option out of range.
    """
    return _checked(model, prompt, None, key, temperature, top_k, top_p)


def generate(
    model: E88LM,
    prompt: Array | np.ndarray,
    length: int,
    *,
    key: Array,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
) -> np.ndarray:
    """The next `length` tokens of each row, `[B, length]` int32; see `generate_stream`.

    Raises:
        ValueError: as `generate_stream`, or a negative length.
    """
    if length < 0:
        raise ValueError(f"length must be at least 0 tokens, got {length}.")
    tokens = _checked(model, prompt, length, key, temperature, top_k, top_p)
    rows = list(itertools.islice(tokens, length))
    return np.stack(rows, axis=1) if rows else np.zeros((prompt.shape[0], 0), np.int32)


def _checked(
    model: E88LM,
    prompt: Array | np.ndarray,
    length: int | None,
    key: Array,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> Iterator[np.ndarray]:
    """`_tokens`, of arguments that are checked before any of them is asked for."""
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or prompt.size == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"prompt must be integers [B, T] with at least one token, got {prompt.dtype} of shape "
            f"{prompt.shape}."
        )
    vocab_size = model.config.vocab_size
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"the prompt's ids must be from 0 to {vocab_size - 1}, got {prompt.min()} to "
            f"{prompt.max()}."
        )
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    greedy = temperature < 1e-6  # where dividing by it would overflow
    options = {
        "temperature": jnp.float32(1 if greedy else temperature),
        "top_p": jnp.float32(top_p),
        "top_k": top_k,
        "greedy": greedy,
    }
    return _tokens(model, jnp.asarray(prompt, jnp.int32), length, key, options)


def _tokens(
    model: E88LM, tokens: Array, length: int | None, key: Array, options: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Without end for a length of None; else in whole blocks, so that some are too many."""
    graphdef, params = for_inference(model)
    state = model.init_state(tokens.shape[0])
    state, drawn, key = prefill(graphdef, params, state, tokens, key, **options)
    yield np.asarray(drawn)
    queued = decode(graphdef, params, state, drawn, key, **options, length=BLOCK)
    for n_drawn in itertools.count(1 + BLOCK, BLOCK):
        state, block, key = queued
        is_last = length is not None and n_drawn >= length
        if not is_last:
            # The device goes on while the host reads what it has drawn.
            queued = decode(graphdef, params, state, block[:, -1], key, **options, length=BLOCK)
        yield from np.asarray(block).T
        if is_last:
            return
