"""States that are carried on, rows that end, logits that are not finite, meshes and jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from e88_jax import sampling
from e88_jax.model import LanguageModel
from e88_jax.sampling import (
    BLOCK,
    ENDED,
    NOT_FINITE,
    decode,
    generate,
    generate_stream,
)
from tests.sampling.common import (
    KEY,
    PROMPT,
    VOCAB,
    assert_close,
    cache_size,
    count_programs,
    draw,
    state_after,
)


class TestState:
    def test_a_state_is_what_a_prompt_continues(self, model: LanguageModel) -> None:
        expected = draw(model)
        nothing, state = draw(model, 0, PROMPT[:, :4], return_state=True)
        assert nothing.shape == (2, 0)
        drawn = draw(model, prompt=PROMPT[:, 4:], state=state)
        np.testing.assert_array_equal(drawn, expected)
        # It is not consumed. A NumPy view of an array keeps JAX from consuming it.
        for same in (list(state), jax.tree.map(np.asarray, state)):
            drawn = draw(model, prompt=PROMPT[:, 4:], state=same)
            np.testing.assert_array_equal(drawn, expected)

    @pytest.mark.parametrize("length", [1, 7, BLOCK + 1])
    def test_the_state_returned_is_after_the_tokens(
        self, model: LanguageModel, length: int
    ) -> None:
        drawn, state = draw(model, length, return_state=True)
        np.testing.assert_array_equal(drawn, draw(model, length))
        tokens = np.concatenate([PROMPT, drawn], axis=1)
        assert_close(state, state_after(model, tokens))

    def test_token_0_is_a_token(self, flat: LanguageModel) -> None:
        before = jax.tree.map(lambda x: x + 0.5, flat.init_state(2))
        options: dict[str, Any] = {"state": before, "return_state": True}
        drawn, state = draw(flat, 7, temperature=0, **options)
        assert np.all(drawn == 0)
        reads_all = draw(flat, 0, np.pad(PROMPT, ((0, 0), (0, 7))), **options)[1]
        assert_close(state, reads_all)

    def test_of_rows_that_ended(self, model: LanguageModel) -> None:
        prompts = [PROMPT[0], PROMPT[1, :3]]
        stop = draw(model, prompt=prompts)[0, 3]
        drawn, state = draw(model, prompt=prompts, stop=stop, return_state=True)
        for b, prompt in enumerate(prompts):
            tokens = np.concatenate([prompt, drawn[b][drawn[b] != ENDED]])
            its_state = [x[b : b + 1] for x in jax.tree.leaves(state)]
            assert_close(its_state, jax.tree.leaves(state_after(model, tokens[None])))


class TestStop:
    def test_rows_end_at_their_first_stop_token(self, model: LanguageModel) -> None:
        whole = draw(model, length=1 + BLOCK)
        stop = np.unique(whole[:, 2])
        drawn = draw(model, length=1 + BLOCK, stop=stop)
        for row, full in zip(drawn, whole, strict=True):
            n_drawn = 1 + int(np.argmax(np.isin(full, stop)))
            np.testing.assert_array_equal(row[:n_drawn], full[:n_drawn])
            assert np.all(row[n_drawn:] == ENDED)
        for same in (set(stop.tolist()), tuple(stop), jnp.asarray(stop), iter(stop.tolist())):
            np.testing.assert_array_equal(draw(model, length=1 + BLOCK, stop=same), drawn)

    def test_numbers_of_stop_tokens_share_programs(self, model: LanguageModel) -> None:
        draw(model, length=2, stop=range(8))
        n_programs = cache_size(decode)
        for n in (5, 6, 7):
            draw(model, length=2, stop=range(n))
        assert cache_size(decode) == n_programs

    def test_none_of_them_drawn(self, model: LanguageModel) -> None:
        expected = draw(model)
        never = np.setdiff1d(np.arange(VOCAB), expected)
        for stop in ([], never, int(never[0])):
            np.testing.assert_array_equal(draw(model, stop=stop), expected)

    def test_the_first_token_and_the_last_of_the_prompt(self, model: LanguageModel) -> None:
        """A stop token of the prompt ends nothing."""
        first = draw(model, length=3, temperature=0)
        drawn = draw(model, length=3, temperature=0, stop=first[:, 0])
        np.testing.assert_array_equal(drawn[:, 0], first[:, 0])
        assert np.all(drawn[:, 1:] == ENDED)
        drawn = draw(model, length=3, temperature=0, stop=np.unique(PROMPT))
        np.testing.assert_array_equal(drawn[:, 0], first[:, 0])

    def test_generation_ends_with_the_last_row(
        self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs = count_programs(monkeypatch)
        stop = range(VOCAB)
        drawn = draw(model, length=1000, stop=stop)
        assert drawn.shape == (2, 1000)
        assert np.all(drawn[:, 1:] == ENDED)
        assert programs["decode"] <= 2
        tokens = list(generate_stream(model, PROMPT, key=jax.random.key(KEY), stop=stop))
        np.testing.assert_array_equal(np.stack(tokens, axis=1), drawn[:, :1])


class TestNotFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("temperature", [0, 0.8])
    def test_weights(self, model: LanguageModel, value: float, temperature: float) -> None:
        broken = nnx.clone(model)
        broken.embed.embedding[...] = broken.embed.embedding[...].at[3, 1].set(value)
        with pytest.raises(ValueError, match=r"logits of row 0 .*not finite.*weights"):
            draw(broken, temperature=temperature)
        with pytest.raises(ValueError, match="not finite"):
            next(generate_stream(broken, PROMPT, key=jax.random.key(0), temperature=temperature))

    def test_a_state(self, model: LanguageModel) -> None:
        state = jax.tree.map(lambda x: x.at[1].set(jnp.nan), model.init_state(2))
        with pytest.raises(ValueError, match="row 1"):
            draw(model, state=state)

    def test_after_the_length_it_is_no_error(
        self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks go past the tokens asked for."""

        def decode(graphdef: Any, params: Any, state: Any, token: Any, key: Any, **_: Any) -> Any:
            block = np.full((2, BLOCK), 65, np.int32)
            block[1, 3:] = [NOT_FINITE] + [ENDED] * (BLOCK - 4)
            return state, block, key

        monkeypatch.setattr(sampling, "decode", decode)
        assert draw(model, length=4).shape == (2, 4)
        with pytest.raises(ValueError, match="row 1"):
            draw(model, length=5)


class TestOnAMesh:
    def test_rows_and_parameters_divided(self, model: LanguageModel) -> None:
        mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])

        def put(x: Any) -> Any:
            spec = PartitionSpec("data") if x.shape[0] % 2 == 0 else PartitionSpec()
            return jax.device_put(x, NamedSharding(mesh, spec))

        graphdef, params = nnx.split(model)
        options: dict[str, Any] = {"length": 2, "lengths": [5, 3], "return_state": True}
        expected, expected_state = draw(model, **options)
        divided = nnx.merge(graphdef, jax.tree.map(put, params))
        with jax.set_mesh(mesh):
            tokens, state = draw(divided, prompt=put(PROMPT), **options)
        np.testing.assert_array_equal(tokens, expected)
        assert_close(state, expected_state)
        assert state[0].recurrent.sharding.spec[0] == "data"


class TestUnderJit:
    def test_it_is_as_without(self, model: LanguageModel) -> None:
        graphdef, params = nnx.split(model)
        stop = np.unique(draw(model, temperature=0)[:, 2])
        options: dict[str, Any] = {"temperature": 0.5, "stop": stop, "return_state": True}

        @jax.jit
        def under_jit(params: Any, prompt: Any, lengths: Any, state: Any, key: Any) -> Any:
            model = nnx.merge(graphdef, params)
            options_ = {"lengths": lengths, "state": state, "key": key, **options}
            return generate(model, prompt, 12, **options_)

        arguments = (jnp.asarray(PROMPT), jnp.asarray([5, 2]), model.init_state(2))
        key = jax.random.key(KEY)
        tokens, state = under_jit(params, *arguments, key)
        assert isinstance(tokens, jax.Array)
        prompt, lengths, before = arguments
        expected, expected_state = draw(
            model, prompt=prompt, lengths=lengths, state=before, key=key, **options
        )
        np.testing.assert_array_equal(tokens, expected)
        assert_close(state, expected_state)
        # Nothing can be raised there.
        broken = jax.tree.map(lambda x: x * jnp.nan, params)
        tokens, _ = under_jit(broken, *arguments, key)
        np.testing.assert_array_equal(tokens, [[NOT_FINITE] + [ENDED] * 11] * 2)

    @pytest.mark.parametrize("length", [0, 1])
    def test_arguments_that_are_constants(self, model: LanguageModel, length: int) -> None:
        drawn = jax.jit(lambda: draw(model, length, PROMPT.tolist()))()
        np.testing.assert_array_equal(drawn, draw(model, length))

    def test_what_it_refuses(self, model: LanguageModel) -> None:
        for name in ("temperature", "top_k", "top_p", "length", "stop"):
            with pytest.raises(TypeError, match=f"^{name} must be"):
                jax.eval_shape(lambda x: draw(model, **{name: x}), jnp.int32(1))  # noqa: B023
        for prompt in (jnp.zeros(3, jnp.int32), jnp.zeros((1, 3))):
            with pytest.raises(ValueError, match=r"^prompt must be"):
                jax.eval_shape(lambda x: draw(model, prompt=x), prompt)
        with pytest.raises(ValueError, match="jit"):
            jax.eval_shape(
                lambda x: generate_stream(model, x, key=jax.random.key(0)), jnp.asarray(PROMPT)
            )
