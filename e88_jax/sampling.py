"""Sampling from a model that carries its state, whose size does not depend on the tokens read.

`prefill` reads the prompt and draws the first token, `decode` draws a block of tokens; `generate`
and `generate_stream` check their arguments and run both.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Set
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from e88_jax.checks import require_instance, require_int, shown
from e88_jax.draw import NOT_FINITE, draw
from e88_jax.model import LanguageModel, LMState
from e88_jax.prompts import Prompt, check_prompt, is_traced, pad, padded_length
from e88_jax.sampling_options import check_sampling_options
from e88_jax.typed import Variables, jit, split

BLOCK = 32
"""Tokens drawn per program."""

ENDED = -1
"""In place of tokens after a row's stop token."""


def read(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Variables,
    state: LMState | None,
    tokens: Array,
    lengths: Array | None = None,
) -> tuple[LMState, Array]:
    """Reads `tokens` `[B, T]` from `state`: the first `lengths[b]` of row b, or all.

    Returns:
        The state after each row's last token, and the logits `[B, vocab]` there.
    """
    model = nnx.merge(graphdef, params)
    rows, time = tokens.shape
    if lengths is None:
        last = jnp.full((rows, 1), time - 1, jnp.int32)
    else:
        last = jnp.maximum(lengths.astype(jnp.int32) - 1, 0)[:, None]
    logits, state = model(tokens, state, lengths=lengths, positions=last)
    return state, logits[:, 0]


def read_and_draw(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Variables,
    state: LMState | None,
    tokens: Array,
    key: Array,
    temperature: Array,
    top_p: Array | None,
    lengths: Array | None = None,
    *,
    top_k: int | None,
    greedy: bool,
    context: int | None = None,
) -> tuple[LMState, Array, Array]:
    """Reads `tokens` as `read` does and draws one more for each row.

    Args:
        graphdef, params: of `model.for_inference()`, split.
        context: in place of the state: starts from `model.init_state(B, context)`.

    Returns:
        The state, the tokens drawn `[B]` int32 (see `draw`) and the key for those to come.
    """
    if context is not None:
        assert state is None, "the state has its own context"
        state = nnx.merge(graphdef, params).init_state(tokens.shape[0], context)
    state, logits = read(graphdef, params, state, tokens, lengths)
    key, step_key = jax.random.split(key)
    return state, draw(logits, step_key, temperature, top_p, top_k=top_k, greedy=greedy), key


_STATIC = ("graphdef", "top_k", "greedy")

prefill = jit(read_and_draw, static_argnames=(*_STATIC, "context"), donate_argnames="state")
"""`read_and_draw` as one program, which consumes the state."""

_read = jit(read, static_argnames="graphdef", donate_argnames="state")


@functools.partial(jit, static_argnames=(*_STATIC, "length"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Variables,
    state: LMState,
    token: Array,
    key: Array,
    temperature: Array,
    top_p: Array | None,
    stop: Array | None = None,
    *,
    top_k: int | None,
    greedy: bool,
    length: int,
) -> tuple[LMState, Array, Array]:
    """Draws `length` tokens one after the other, after `token` `[B]`.

    One program, so that the device does not wait for the host at each token; otherwise like
    `prefill`, which also consumes the state. After one of `stop` `[n]` int32, or `NOT_FINITE`, a
    row's tokens are `ENDED`.

    Returns:
        The state, the tokens drawn `[B, length]` int32 and the key for those to come.
    """

    def one(carry: Any, _: None) -> tuple[Any, Array]:
        state, token, key = carry
        ended = token < 0
        if stop is not None:
            ended |= jnp.any(token[:, None] == stop[None, :], axis=1)
        state, drawn, key = read_and_draw(
            graphdef,
            params,
            state,
            jnp.maximum(token, 0)[:, None],
            key,
            temperature,
            top_p,
            top_k=top_k,
            greedy=greedy,
        )
        drawn = jnp.where(ended, ENDED, drawn)
        return (state, drawn, key), drawn

    (state, _, key), drawn = lax.scan(one, (state, token, key), length=length)
    return state, drawn.T, key


def generate_stream(
    model: LanguageModel,
    prompt: Prompt,
    *,
    key: Array,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    lengths: ArrayLike | None = None,
    state: LMState | None = None,
    stop: int | Iterable[int] | None = None,
) -> Iterator[np.ndarray]:
    """Draws tokens without end, in constant memory.

    Arguments are those of `generate`. A model with attention without a window needs a `state`,
    which says how many tokens it remembers.

    Yields:
        The next token of each row, `[B]` int32; with `stop`, until every row has ended.

    Raises:
        TypeError, ValueError: as `generate`, at the call; for logits, when they are drawn from.
    """
    call = _Call(model, prompt, key, temperature, top_k, top_p, lengths, state, stop, None)
    state, token, key = call.prefill()
    if is_traced(token):
        raise ValueError("generate_stream cannot run under jax.jit; generate can.")
    return call.tokens(state, token, key)


def generate(
    model: LanguageModel,
    prompt: Prompt,
    length: int,
    *,
    key: Array,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    lengths: ArrayLike | None = None,
    state: LMState | None = None,
    stop: int | Iterable[int] | None = None,
    return_state: bool = False,
) -> Any:
    """Continues each row of `prompt` by `length` tokens.

    Each row is continued as if it were alone, to within rounding of the logits. Row b's random
    numbers depend on `key` and b only, and the first n tokens are the same for every length of at
    least n. Defaults are those of the original implementation.

    Under `jax.jit` everything but model, prompt, key, lengths and state is static, the result is a
    JAX array, values of traced arguments are not checked, and the whole length is computed.

    Args:
        model: the language model.
        prompt: ids `[B, T]`, integers; or B rows of different lengths, a list of lists or of 1-D
            arrays; or, for a model of bytes (a vocabulary of 256), text: str (as UTF-8) or bytes
            for one row, a list of them for B. Each row has at least one token.
        length: tokens to draw, at least 0.
        key: one JAX random key, by `jax.random.key` or `jax.random.PRNGKey`.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens; None for all.
        top_p: sample among the likeliest tokens that together hold this probability, in (0, 1].
        lengths: `[B]` integers, for a padded prompt: the first `lengths[b]` tokens of row b are
            its prompt.
        state: state of as many rows that the prompt continues; None starts from zeros. Attention
            without a window then remembers at least the prompt and `length` tokens; for a text that
            goes on, give `model.init_state(B, context)`.
        stop: an id or several: a row ends with the first of them that it draws.
        return_state: also return the state after the tokens.

    Returns:
        tokens `[B, length]` int32; after a row's stop token they are `ENDED`, -1. With
        `return_state`, `(tokens, state)`: the state of row b is after its prompt and its tokens,
        the stop token included, so that the next prompt can continue it.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, or logits that are not finite. Under `jax.jit` these
            give `NOT_FINITE`, -2, in place of the token, and then `ENDED`.
    """
    length = require_int("length", length, 0)
    call = _Call(model, prompt, key, temperature, top_k, top_p, lengths, state, stop, length)
    if length == 0 and not return_state:
        return np.zeros((call.batch, 0), np.int32)
    state, token, key = call.prefill()
    after_prompt = _copy(state) if return_state else None
    if is_traced(token):
        _, drawn, _ = call.decode(state, token, key, length=max(length - 1, 0))
        tokens = jnp.concatenate([token[:, None], drawn], axis=1)[:, :length]
    else:
        drawn = itertools.islice(call.tokens(state, token, key, length), length)
        tokens = np.full((call.batch, length), ENDED, np.int32)
        for t, token in enumerate(drawn):
            tokens[:, t] = token
    return tokens if after_prompt is None else (tokens, call.read(after_prompt, tokens))


class _Call:
    """The arguments of a call of `generate`, checked, and the programs run with them."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        key: Array,
        temperature: float,
        top_k: int | None,
        top_p: float,
        lengths: ArrayLike | None,
        state: LMState | None,
        stop: int | Iterable[int] | None,
        length: int | None,
    ):
        require_instance("model", model, LanguageModel)
        vocab_size = model.config.vocab_size
        self.prompt, self.lengths = check_prompt(prompt, lengths, vocab_size)
        self.batch = self.prompt.shape[0]
        self.key = _check_key(key)
        self.options = _check_options(temperature, top_k, top_p, vocab_size)
        self.stop = _check_stop(stop, vocab_size)
        self.state = None if state is None else model.check_state(state, self.batch)
        self.context: int | None = None
        if state is None and model.needs_context:
            if length is None:
                raise ValueError(
                    "state must be given to draw without end from a model with attention without a "
                    f"window, such as model.init_state({self.batch}, context=2048), the most "
                    "tokens that it remembers; got None."
                )
            # As of prompts, few programs serve all lengths.
            self.context = padded_length(self.prompt.shape[1] + length)
        self.graphdef, self.params = split(model.for_inference())
        # A committed prompt stays on its devices; any other goes where the parameters are.
        self.sharding = None
        if isinstance(prompt, Array) and not is_traced(prompt) and prompt.committed:
            self.sharding = prompt.sharding

    def prefill(self) -> tuple[LMState, Array, Array]:
        """The state after the prompt, the first token drawn `[B]` and the key for the next."""
        state = None if self.state is None else _copy(self.state)  # the caller keeps theirs
        tokens, lengths = pad(self.prompt, self.lengths, self.sharding)
        options: dict[str, Any] = {**self.options, "context": self.context}
        return prefill(
            self.graphdef, self.params, state, tokens, self.key, lengths=lengths, **options
        )

    def decode(
        self, state: LMState, token: Array, key: Array, length: int
    ) -> tuple[LMState, Array, Array]:
        """The `length` tokens after `token`, as one program."""
        options: dict[str, Any] = {**self.options, "stop": self.stop, "length": length}
        return decode(self.graphdef, self.params, state, token, key, **options)

    def tokens(
        self, state: LMState, token: Array, key: Array, length: int | None = None
    ) -> Iterator[np.ndarray]:
        """`token` and those after it, until every row has ended; `length` or more if given."""
        block, n_queued = token[:, None], 1
        while block is not None:
            queued = None
            if length is None or n_queued < length:
                # The device goes on while the host reads what it has drawn.
                state, queued, key = self.decode(state, block[:, -1], key, BLOCK)
                n_queued += BLOCK
            for drawn in np.asarray(block).T:
                if np.any(drawn == NOT_FINITE):
                    row = int(np.argmax(drawn == NOT_FINITE))
                    raise ValueError(
                        f"the logits of row {row} are not finite: the model's weights or its state "
                        "hold NaN or infinity, or a sum overflowed."
                    )
                if np.all(drawn == ENDED):
                    return
                yield drawn
            block = queued

    def read(self, state: LMState, tokens: np.ndarray | Array) -> LMState:
        """The state after the `tokens` `[B, T]` that were drawn from `state`, which is consumed.

        Tokens are read again, as the blocks in which they were drawn went on past them.
        """
        if tokens.shape[1] == 0:
            return state
        lengths = (tokens >= 0).sum(axis=1).astype(np.int32)
        tokens, lengths = pad(tokens.clip(0), lengths, self.sharding)
        state, _ = _read(self.graphdef, self.params, state, tokens, lengths)
        return state


def _check_key(key: Any) -> Array:
    """The key, typed."""
    key = jnp.asarray(key) if isinstance(key, np.ndarray) else key
    if isinstance(key, Array):
        if key.ndim == 1 and key.dtype == np.uint32:  # by jax.random.PRNGKey
            with contextlib.suppress(TypeError, ValueError):
                return cast(Array, jax.random.wrap_key_data(key))
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
    raise TypeError(f"key must be one random key, such as jax.random.key(0), got {shown(key)}.")


def _check_options(temperature: Any, top_k: Any, top_p: Any, vocab_size: int) -> dict[str, Any]:
    """Options of `read_and_draw`; one that changes nothing is None, so that programs are shared."""
    temperature, top_k, top_p = check_sampling_options(temperature, top_k, top_p)
    greedy = temperature < np.finfo(np.float32).tiny  # smaller is 0 to a device
    return {
        "temperature": np.float32(1 if greedy else temperature),
        "top_p": None if greedy or top_p == 1 else np.float32(top_p),
        "top_k": None if greedy or top_k is None or top_k >= vocab_size else top_k,
        "greedy": greedy,
    }


def _check_stop(stop: Any, vocab_size: int) -> np.ndarray | None:
    """The ids, int32; None if there are none."""
    if stop is None:
        return None
    ids = None if isinstance(stop, str | bytes) or is_traced(stop) else stop
    ids = np.asarray(list(cast(Iterable[int], ids)) if isinstance(ids, Set | Iterator) else ids)
    if ids.size == 0:
        return None
    if ids.ndim > 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"stop must be ids, such as ord('.') or [10, 46], got {shown(stop)}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"stop must be ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}."
        )
    ids = np.unique(ids).astype(np.int32)
    # Padded to a power of two, so that few programs serve all numbers of ids.
    return np.pad(ids, (0, (1 << (ids.size - 1).bit_length()) - ids.size), mode="edge")


def _copy(state: LMState) -> LMState:
    return jax.tree.map(jnp.copy, state)
