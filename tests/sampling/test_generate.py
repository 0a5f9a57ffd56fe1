"""`generate` and `generate_stream`: which tokens are drawn, and by which programs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax import sampling
from e88_jax.model import LanguageModel
from e88_jax.sampling import (
    BLOCK,
    decode,
    generate,
    generate_stream,
    prefill,
)
from tests.sampling.common import (
    KEY,
    PROMPT,
    VOCAB,
    cache_size,
    count_programs,
    draw,
    numpy_filter,
    run,
)


class TestGenerate:
    def test_greedy_is_the_argmax_of_the_full_forward(self, model: LanguageModel) -> None:
        drawn = draw(model, temperature=0)
        tokens = np.concatenate([PROMPT, drawn], axis=1)
        logits, _ = run(model, jnp.asarray(tokens))
        np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1)[:, 4:-1])
        assert len(set(drawn.flatten().tolist())) > 1
        np.testing.assert_array_equal(draw(model, top_k=1, temperature=3.0), drawn)

    def test_the_prompt_in_one_pass_equals_token_by_token(self, model: LanguageModel) -> None:
        logits, state = run(model, jnp.asarray(PROMPT[:, :1]), model.init_state(2))
        for t in range(1, PROMPT.shape[1]):
            logits, state = run(model, jnp.asarray(PROMPT[:, t : t + 1]), state)
        drawn = []
        for _ in range(12):
            drawn.append(np.argmax(logits[:, -1], axis=-1))
            logits, state = run(model, jnp.asarray(drawn[-1][:, None], jnp.int32), state)
        np.testing.assert_array_equal(draw(model, temperature=0), np.stack(drawn, axis=1))

    def test_keys(self, model: LanguageModel) -> None:
        first = draw(model)
        np.testing.assert_array_equal(first, draw(model))
        assert not np.array_equal(first, draw(model, key=jax.random.key(KEY + 1)))
        assert first.shape == (2, 12)
        assert first.dtype == np.int32
        assert first.min() >= 0
        assert first.max() < VOCAB

    def test_it_draws_from_the_distribution(self, model: LanguageModel) -> None:
        n = 4000
        same = np.tile(PROMPT[:1], (n, 1))
        options: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
        (drawn,) = generate(model, same, 1, key=jax.random.key(1), **options).T
        logits, _ = run(model, jnp.asarray(PROMPT[:1]))
        expected = numpy_filter(np.asarray(logits[:, -1]), **options)[0]
        frequencies = np.bincount(drawn, minlength=VOCAB) / n
        assert np.all((frequencies > 0) <= (expected > 0))
        np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(n))

    @pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 34, 64, np.int64(12), np.uint8(65)])
    def test_lengths_and_streams_begin_alike(self, model: LanguageModel, length: int) -> None:
        longest = draw(model, length=1 + 2 * BLOCK)
        drawn = draw(model, length=length)
        assert drawn.dtype == np.int32
        np.testing.assert_array_equal(drawn, longest[:, :length])
        tokens = generate_stream(model, PROMPT, key=jax.random.key(KEY))
        first = list(itertools.islice(tokens, int(length)))
        np.testing.assert_array_equal(np.array(first, np.int32).reshape(-1, 2).T, drawn)

    @pytest.mark.parametrize(
        ("length", "n_blocks"), [(0, 0), (1, 0), (2, 1), (1 + BLOCK, 1), (2 + BLOCK, 2)]
    )
    def test_no_more_blocks_than_needed(
        self, model: LanguageModel, length: int, n_blocks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs = count_programs(monkeypatch)
        draw(model, length=length)
        assert programs == {"prefill": int(length > 0), "decode": n_blocks}

    def test_each_token_draws_its_own_number(self, flat: LanguageModel) -> None:
        """From a flat distribution, a key used twice repeats its token."""
        drawn = draw(flat, length=1 + 2 * BLOCK, temperature=1.0, top_k=None)
        blocks = drawn[:, 1:].reshape(2, 2, BLOCK)
        for one, other in [(blocks[0], blocks[1]), (blocks[:, 0], blocks[:, 1])]:
            assert np.mean(one == other) < 0.2
        assert np.mean(drawn[:, 1:] == drawn[:, :-1]) < 0.2
        assert drawn[0, 0] != drawn[1, 0]  # those that are drawn with the prompt

    def test_options_reach_the_distribution(self, flat: LanguageModel) -> None:
        """Equal logits are kept lowest ids first."""
        for options, n_kept in [({"top_k": 50}, 50), ({"top_k": None, "top_p": 0.25}, 64)]:
            drawn = draw(flat, length=1 + 2 * BLOCK, **options)
            assert n_kept - 10 < np.max(drawn) < n_kept

    @pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-37])
    def test_low_temperatures_choose_among_equals(
        self, flat: LanguageModel, temperature: float
    ) -> None:
        assert len(np.unique(draw(flat, temperature=temperature))) > 5
        assert np.all(draw(flat, temperature=0) == 0)

    def test_memory_is_constant(
        self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = []

        def watched(graphdef: Any, params: Any, state: Any, *a: Any, **k: Any) -> Any:
            shapes.append([x.shape for x in jax.tree.leaves((state, a))])
            return decode(graphdef, params, state, *a, **k)

        monkeypatch.setattr(sampling, "decode", watched)
        draw(model, length=1 + 3 * BLOCK)
        assert shapes == [shapes[0]] * 3

    def test_lengths_of_prompts_share_programs(self, model: LanguageModel) -> None:
        draw(model, prompt=np.zeros((2, 9), np.int32), length=1)
        n_programs = cache_size(prefill)
        for length in range(10, 16):
            draw(model, prompt=np.zeros((2, length), np.int32), length=1)
        assert cache_size(prefill) == n_programs

    def test_the_same_key_typed_or_not(self, model: LanguageModel) -> None:
        expected = draw(model)
        np.testing.assert_array_equal(draw(model, key=jax.random.PRNGKey(KEY)), expected)
        np.testing.assert_array_equal(draw(model, key=np.asarray([0, KEY], np.uint32)), expected)

    def test_options_as_numpy_has_them(self, model: LanguageModel) -> None:
        options = {"temperature": np.float32(0.8), "top_k": np.int8(40), "top_p": np.int64(1)}
        np.testing.assert_array_equal(draw(model, **options), draw(model))
        everything = draw(model, top_k=None)
        for top_k in (VOCAB, VOCAB + 1):
            np.testing.assert_array_equal(draw(model, top_k=top_k), everything)
