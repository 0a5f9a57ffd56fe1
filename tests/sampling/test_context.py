"""Models with attention without a window, which remember as many tokens as they are told to."""

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
MODELS = {
    "attention": (ATTENTION,),
    "hybrid": (E88Config(n_heads=2, n_state=4), ATTENTION, LSTMConfig(width=5)),
}


def model_of(*layers: Any) -> LanguageModel:
    config = LMConfig(dim=12, depth=3, layers=layers, execution=Execution(dtype="float32"))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    # With small initial weights a model repeats its last token.
    model.embed.embedding[...] = 5 * model.embed.embedding[...]
    for name, param in params_by_path(model).items():
        if name.endswith(("output.kernel", "projection.kernel", "q_norm.scale")):
            param[...] = 10 * param[...]
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return model_of(*MODELS[request.param])


@pytest.fixture(scope="module")
def attention() -> LanguageModel:
    return model_of(ATTENTION)


def greedy(model: LanguageModel, tokens: np.ndarray, length: int) -> np.ndarray:
    """The likeliest tokens, by whole forward passes over all that there are, padded with zeros."""
    n = tokens.shape[1]
    whole = np.zeros((tokens.shape[0], n + length), np.int32)
    whole[:, :n] = tokens
    for t in range(n, n + length):
        logits, _ = run(model, jnp.asarray(whole))
        whole[:, t] = np.argmax(logits[:, t - 1], axis=-1)
    return whole[:, n:]


def test_generate_is_greedy_decoding_by_whole_passes(model: LanguageModel) -> None:
    """Over several blocks, from a prompt whose length is padded."""
    length = BLOCK + 9
    expected = greedy(model, PROMPT, length)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(draw(model, length, temperature=0), expected)


def test_rows_of_different_lengths(model: LanguageModel) -> None:
    drawn = draw(model, 12, prompt=[PROMPT[0], PROMPT[1, :2]], temperature=0)
    for row, prompt in zip(drawn, (PROMPT[:1], PROMPT[1:, :2]), strict=True):
        np.testing.assert_array_equal(row[None], greedy(model, prompt, 12))


def test_the_state_remembers_the_prompt_and_the_tokens(attention: LanguageModel) -> None:
    drawn, state = draw(attention, 9, temperature=0, return_state=True)
    _, expected = run(attention, jnp.asarray(np.concatenate([PROMPT, drawn], axis=1)))
    for layer, wanted in zip(state, expected, strict=True):
        assert layer.keys.shape[1] == 16  # 5 + 9, rounded up
        assert not np.any(layer.keys[:, 14:])
        held = layer._replace(keys=layer.keys[:, :14], values=layer.values[:, :14])
        assert_close(held, wanted)


def test_a_state_of_the_callers_bounds_the_memory(attention: LanguageModel) -> None:
    """Six tokens are remembered: a window of six draws the same."""
    windowed = model_of(AttentionConfig(n_heads=4, head_dim=4, n_kv_heads=2, window=6))
    nnx.update(windowed, nnx.state(attention))
    start = attention.init_state(2, context=6)
    drawn = draw(attention, 40, temperature=0, state=start)
    np.testing.assert_array_equal(drawn, draw(windowed, 40, temperature=0))
    assert np.any(drawn != draw(attention, 40, temperature=0))
    assert not start[0].keys.is_deleted()


def test_a_stream_needs_a_state(model: LanguageModel) -> None:
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"state must be given .*init_state\(2, context=2048\),"):
        generate_stream(model, PROMPT, key=key)
    state = model.init_state(2, context=50)
    stream = generate_stream(model, PROMPT, key=key, temperature=0, state=state)
    drawn = np.stack(list(itertools.islice(stream, 20)), axis=1)
    np.testing.assert_array_equal(drawn, draw(model, 20, temperature=0))
    windowed = model_of(AttentionConfig(n_heads=4, head_dim=4, window=6))
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
