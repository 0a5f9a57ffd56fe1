import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import generate as generate_module
from e88_jax.config import E88Config, LMConfig
from e88_jax.generate import (
    BLOCK,
    filter_logits,
    for_inference,
    generate,
    generate_stream,
)
from e88_jax.model import E88LM

VOCAB = 19
KEY = 7
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> E88LM:
    layer = E88Config(dim=12, n_heads=3, n_state=4, conv_size=3, dtype="float32")
    model = E88LM(LMConfig(layer=layer, depth=1, vocab_size=VOCAB), rngs=nnx.Rngs(0))
    # Small initial weights would make all tokens about as likely.
    model.embed.embedding[...] = 25 * model.embed.embedding[...]
    return model


@nnx.jit
def run(model: E88LM, tokens: Any, state: Any = None) -> Any:
    return model(tokens, state)


def draw(model: E88LM, length: int = 12, **options: Any) -> np.ndarray:
    options.setdefault("key", jax.random.key(KEY))
    return generate(model, PROMPT, length, **options)


class TestGenerate:
    def test_greedy_is_the_argmax_of_the_full_forward(self, model: E88LM) -> None:
        drawn = draw(model, temperature=0)
        tokens = np.concatenate([PROMPT, drawn], axis=1)
        logits, _ = run(model, jnp.asarray(tokens))
        np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1)[:, 4:-1])
        assert len(set(drawn.flatten().tolist())) > 1
        np.testing.assert_array_equal(draw(model, top_k=1, temperature=3.0), drawn)

    def test_the_prompt_in_one_pass_equals_token_by_token(self, model: E88LM) -> None:
        logits, state = run(model, jnp.asarray(PROMPT[:, :1]), model.init_state(2))
        for t in range(1, PROMPT.shape[1]):
            logits, state = run(model, jnp.asarray(PROMPT[:, t : t + 1]), state)
        drawn = []
        for _ in range(12):
            drawn.append(np.argmax(logits[:, -1], axis=-1))
            logits, state = run(model, jnp.asarray(drawn[-1][:, None], jnp.int32), state)
        np.testing.assert_array_equal(draw(model, temperature=0), np.stack(drawn, axis=1))

    def test_keys(self, model: E88LM) -> None:
        first = draw(model)
        np.testing.assert_array_equal(first, draw(model))
        assert not np.array_equal(first, draw(model, key=jax.random.key(KEY + 1)))
        assert first.shape == (2, 12)
        assert first.dtype == np.int32
        assert first.min() >= 0
        assert first.max() < VOCAB

    def test_rows_and_steps_draw_apart(self, model: E88LM) -> None:
        """From a flat distribution, a key used twice would repeat its token."""
        same = np.tile(PROMPT[:1], (8, 1))
        drawn = generate(model, same, 8, key=jax.random.key(0), temperature=1e6, top_k=None)
        assert len(set(drawn[:, 0].tolist())) > 2
        assert len(set(drawn[0].tolist())) > 2

    def test_it_draws_from_the_distribution(self, model: E88LM) -> None:
        n = 4000
        same = np.tile(PROMPT[:1], (n, 1))
        options: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
        (drawn,) = generate(model, same, 1, key=jax.random.key(1), **options).T
        logits, _ = run(model, jnp.asarray(PROMPT[:1]))
        expected = numpy_filter(np.asarray(logits[:, -1]), **options)[0]
        frequencies = np.bincount(drawn, minlength=VOCAB) / n
        assert np.all((frequencies > 0) <= (expected > 0))
        np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(n))

    def test_a_stream_goes_on_as_generate_began(self, model: E88LM) -> None:
        tokens = generate_stream(model, jnp.asarray(PROMPT), key=jax.random.key(KEY))
        first = np.stack(list(itertools.islice(tokens, 12)), axis=1)
        np.testing.assert_array_equal(first, draw(model))

    @pytest.mark.parametrize("length", [1, 2, 1 + BLOCK, 2 + BLOCK])
    def test_tokens_of_a_length_end(self, model: E88LM, length: int) -> None:
        """After whole blocks."""
        options = (jax.random.key(KEY), 0.8, 40, 1.0)
        tokens = list(generate_module._checked(model, PROMPT, length, *options))
        assert len(tokens) == 1 + BLOCK * max(1, -(-(length - 1) // BLOCK))
        np.testing.assert_array_equal(np.stack(tokens[:length], axis=1), draw(model, length=length))

    def test_memory_and_programs_are_constant(
        self, model: E88LM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes: dict[str, list[Any]] = {}

        def watch(name: str) -> None:
            program = getattr(generate_module, name)

            def watched(graphdef: Any, params: Any, state: Any, tokens: Any, *a: Any, **k: Any):
                now = (tokens.shape, *(x.shape for x in jax.tree.leaves(state)))
                shapes.setdefault(name, []).append(now)
                return program(graphdef, params, state, tokens, *a, **k)

            monkeypatch.setattr(generate_module, name, watched)

        watch("prefill")
        watch("decode")
        draw(model, length=1 + 2 * BLOCK)
        ((prompt, *states),) = shapes["prefill"]
        assert prompt == (2, 5)
        assert shapes["decode"] == [((2,), *states)] * 2

    def test_weights_of_products_are_read_narrow(self) -> None:
        layer = E88Config(dim=12, n_heads=3, n_state=4, conv_size=3, dtype="bfloat16")
        model = E88LM(LMConfig(layer=layer, depth=1, vocab_size=VOCAB), rngs=nnx.Rngs(0))
        graphdef, params = for_inference(model)
        dtypes = {"/".join(map(str, p)): str(x.dtype) for p, x in nnx.to_flat_state(params)}
        narrow = {path for path, dtype in dtypes.items() if dtype == "bfloat16"}
        assert narrow == {
            f"blocks/0/mixer/{name}" for name in ("joined_proj/kernel", "o_proj/kernel")
        }
        assert set(dtypes.values()) == {"bfloat16", "float32"}
        logits, _ = run(model, jnp.asarray(PROMPT))
        same, _ = run(nnx.merge(graphdef, params), jnp.asarray(PROMPT))
        np.testing.assert_array_equal(logits, same)

    @pytest.mark.parametrize(
        "options",
        [
            {"output_gate": "none", "decay_mode": "none"},
            {"tie_kv": True, "write_gate": True, "head_mix": "input_weighted"},
            {"head_mix": "per_head", "decay_mode": "simple", "conv_size": 2},
        ],
        ids=str,
    )
    def test_a_model_made_to_decode_computes_the_same(self, options: dict[str, Any]) -> None:
        layer = E88Config(dim=12, n_heads=3, n_state=4, dtype="float32", **options)
        config = LMConfig(layer=layer, depth=2, vocab_size=VOCAB, channel_mixer_dim=8)
        model = E88LM(config, rngs=nnx.Rngs(0))
        same = nnx.merge(*for_inference(model))
        same = nnx.merge(*for_inference(same))  # as it is already
        for tokens in (PROMPT, PROMPT[:, :1]):
            expected, state = run(model, jnp.asarray(tokens))
            logits, its_state = run(same, jnp.asarray(tokens))
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                its_state,
                state,
            )
        assert not hasattr(model.blocks[0].mixer, "joined_proj")

    def test_no_tokens(self, model: E88LM) -> None:
        assert draw(model, length=0).shape == (2, 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -0.1}, r"temperature.*0.*-0\.1"),
            ({"temperature": float("nan")}, "temperature.*nan"),
            ({"top_k": 0}, "top_k.*1.*0"),
            ({"top_p": 0.0}, r"top_p.*\(0, 1\].*0\.0"),
            ({"top_p": 1.1}, r"top_p.*\(0, 1\].*1\.1"),
            ({"length": -1}, "length.*0.*-1"),
        ],
    )
    def test_bad_options(self, model: E88LM, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            draw(model, **options)

    @pytest.mark.parametrize("shape", [(2, 0), (5,)])
    def test_bad_prompts(self, model: E88LM, shape: tuple[int, ...]) -> None:
        """Refused by the call, not by the first token."""
        with pytest.raises(ValueError, match="prompt") as error:
            generate_stream(model, np.zeros(shape, np.int32), key=jax.random.key(0))
        assert str(shape) in str(error.value)


def numpy_filter(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> np.ndarray:
    """Probabilities to sample from, one row at a time."""
    rows = []
    for row in logits.astype(np.float64) / temperature:
        order = np.argsort(-row)[:top_k]
        likeliest = np.exp(row[order] - row[order[0]])
        likeliest /= np.sum(likeliest)
        n_kept = 1
        while (np.sum(likeliest[:n_kept]) < top_p or top_p == 1) and n_kept < len(order):
            n_kept += 1
        result = np.zeros(row.shape)
        result[order[:n_kept]] = likeliest[:n_kept] / np.sum(likeliest[:n_kept])
        rows.append(result)
    return np.stack(rows)


class TestFilterLogits:
    LOGITS = np.random.default_rng(3).normal(size=(5, 30)).astype(np.float32) * 3

    def probabilities(self, logits: Any, **options: Any) -> np.ndarray:
        temperature = jnp.float32(options.get("temperature", 1.0))
        top_p = jnp.float32(options.get("top_p", 1.0))
        filtered = filter_logits(jnp.asarray(logits), temperature, options.get("top_k"), top_p)
        return np.asarray(jax.nn.softmax(filtered, axis=-1))

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("top_k", [None, 1, 7, 30, 100])
    @pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
    def test_against_numpy(self, temperature: float, top_k: int | None, top_p: float) -> None:
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        expected = numpy_filter(self.LOGITS, **options)
        actual = self.probabilities(self.LOGITS, **options)
        np.testing.assert_array_equal(actual > 0, expected > 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)

    def test_the_set_is_the_smallest_that_holds_the_mass(self) -> None:
        logits = np.log(np.array([[0.125, 0.5, 0.25, 0.125]], np.float32))
        for top_p, kept in [(0.4, [1]), (0.6, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2, 3])]:
            assert np.flatnonzero(self.probabilities(logits, top_p=top_p)).tolist() == kept

    def test_everything_is_kept_by_default(self) -> None:
        """Also what is too unlikely for a float32 sum of probabilities to notice."""
        logits = np.array([[0.0, -20.0, -30.0, -80.0]], np.float32)
        assert np.all(self.probabilities(logits) > 0)

    @pytest.mark.parametrize("token", [-1, 256])
    def test_prompts_outside_the_vocabulary(self, model: E88LM, token: int) -> None:
        vocab_size = model.config.vocab_size
        token = min(token, vocab_size)
        with pytest.raises(ValueError, match=f"from 0 to {vocab_size - 1}, got {token} to {token}"):
            generate_stream(model, np.full((1, 3), token), key=jax.random.key(0))

    def test_prompts_that_are_not_integers(self, model: E88LM) -> None:
        with pytest.raises(ValueError, match=r"integers.*float32"):
            generate_stream(model, np.zeros((1, 3), np.float32), key=jax.random.key(0))

    def test_a_vanishing_temperature_is_greedy(self, model: E88LM) -> None:
        greedy = draw(model, temperature=0.0)
        np.testing.assert_array_equal(draw(model, temperature=1e-40), greedy)
