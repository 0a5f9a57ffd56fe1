"""Models with attention without a window, which remember as many tokens as they are told to.

One of attention alone, and one with it between an E88 layer and an LSTM.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import AttentionConfig, E88Config, LanguageModel, LMConfig, LSTMConfig
from e88_jax.mixers.base import Execution
from e88_jax.sampling import BLOCK, generate_stream, prefill
from e88_jax.typed import params_by_path
from tests.sampling.common import PROMPT, assert_close, cache_size, draw, run

ATTENTION = AttentionConfig(n_heads=4, head_dim=4, n_kv_heads=2)
LENGTH = BLOCK + 9
"""Tokens of the longest texts after `PROMPT`, over several blocks."""


def model_of(*layers: Any) -> LanguageModel:
    config = LMConfig(
        dim=12, depth=len(layers), layers=layers, execution=Execution(dtype="float32")
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    # With small initial weights a model repeats its last token.
    model.embed.embedding[...] = 5 * model.embed.embedding[...]
    for name, param in params_by_path(model).items():
        if name.endswith(("output.kernel", "projection.kernel", "q_norm.scale")):
            param[...] = 10 * param[...]
    return model


@pytest.fixture(scope="module")
def hybrid() -> LanguageModel:
    return model_of(E88Config(n_heads=2, n_state=4), ATTENTION, LSTMConfig(width=5))


@pytest.fixture(scope="module")
def attention() -> LanguageModel:
    return model_of(ATTENTION, ATTENTION)


@pytest.fixture(scope="module")
def windowed(attention: LanguageModel) -> LanguageModel:
    """The weights of `attention` with a window of six tokens."""
    layer = dataclasses.replace(ATTENTION, window=6)
    windowed = model_of(layer, layer)
    nnx.update(windowed, nnx.state(attention))
    return windowed


def greedy(model: LanguageModel, prompts: Any, length: int) -> np.ndarray:
    """The likeliest tokens, by whole forward passes over all that there are, padded with zeros to
    one length."""
    whole = np.zeros((2, PROMPT.shape[1] + LENGTH), np.int32)
    for row, prompt in zip(whole, prompts, strict=True):
        row[: len(prompt)] = prompt
    for t in range(length):
        logits, _ = run(model, jnp.asarray(whole))
        for row, prompt, likely in zip(whole, prompts, np.argmax(logits, axis=-1), strict=True):
            row[len(prompt) + t] = likely[len(prompt) + t - 1]
    pairs = zip(whole, prompts, strict=True)
    return np.stack([row[len(prompt) :][:length] for row, prompt in pairs])


@pytest.mark.parametrize("name", ["attention", "hybrid"])
def test_generate_is_greedy_decoding_by_whole_passes(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Over several blocks, from a prompt whose length is padded."""
    model = request.getfixturevalue(name)
    expected = greedy(model, PROMPT, LENGTH)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(draw(model, LENGTH, temperature=0), expected)


def test_rows_of_different_lengths(hybrid: LanguageModel) -> None:
    prompts = [PROMPT[0], PROMPT[1, :2]]
    drawn = draw(hybrid, 12, prompt=prompts, temperature=0)
    np.testing.assert_array_equal(drawn, greedy(hybrid, prompts, 12))


def test_the_state_remembers_the_prompt_and_the_tokens(attention: LanguageModel) -> None:
    drawn, state = draw(attention, 9, temperature=0, return_state=True)
    _, expected = run(attention, jnp.asarray(np.concatenate([PROMPT, drawn], axis=1)))
    for layer, wanted in zip(state, expected, strict=True):
        assert layer.keys.shape[1] == 16  # 5 + 9, rounded up
        assert not np.any(layer.keys[:, 14:])
        held = layer._replace(keys=layer.keys[:, :14], values=layer.values[:, :14])
        assert_close(held, wanted)


def test_a_state_of_the_callers_bounds_the_memory(
    attention: LanguageModel, windowed: LanguageModel
) -> None:
    """Six tokens are remembered: a window of six draws the same."""
    start = attention.init_state(2, context=6)
    drawn = draw(attention, 40, temperature=0, state=start)
    np.testing.assert_array_equal(drawn, draw(windowed, 40, temperature=0))
    assert np.any(drawn != draw(attention, 40, temperature=0))
    assert not start[0].keys.is_deleted()


def test_a_stream_needs_a_state(attention: LanguageModel, windowed: LanguageModel) -> None:
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"state must be given .*init_state\(2, context=2048\),"):
        generate_stream(attention, PROMPT, key=key)
    state = attention.init_state(2, context=50)
    stream = generate_stream(attention, PROMPT, key=key, temperature=0, state=state)
    drawn = np.stack(list(itertools.islice(stream, 20)), axis=1)
    np.testing.assert_array_equal(drawn, greedy(attention, PROMPT, 20))
    stream = generate_stream(windowed, PROMPT, key=key, temperature=0)
    drawn = np.stack(list(itertools.islice(stream, 20)), axis=1)
    np.testing.assert_array_equal(drawn, draw(windowed, 20, temperature=0))


def test_lengths_share_programs(attention: LanguageModel) -> None:
    draw(attention, 33)
    n_programs = cache_size(prefill)
    for length in range(28, 36):  # 33 to 40 tokens with those of the prompt
        draw(attention, length)
    assert cache_size(prefill) == n_programs


def test_under_jit(attention: LanguageModel) -> None:
    compiled = jax.jit(lambda prompt: draw(attention, 12, prompt=prompt, temperature=0))
    np.testing.assert_array_equal(compiled(PROMPT), greedy(attention, PROMPT, 12))
