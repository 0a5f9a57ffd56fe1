import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e88_jax.generate import (
    BLOCK,
    ENDED,
    NOT_FINITE,
    decode,
    filter_logits,
    for_inference,
    generate,
    generate_stream,
    prefill,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from e88_jax import generate as generate_module
from e88_jax.config import E88Config, LMConfig
from e88_jax.model import E88LM
from e88_jax.prompts import padded_length

VOCAB = 256
KEY = 7
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> E88LM:
    layer = E88Config(dim=12, n_heads=3, n_state=4, conv_size=3, dtype="float32")
    model = E88LM(LMConfig(layer=layer, depth=1, vocab_size=VOCAB), rngs=nnx.Rngs(0))
    # Small initial weights would make all tokens about as likely.
    model.embed.embedding[...] = 25 * model.embed.embedding[...]
    return model


@pytest.fixture(scope="module")
def flat(model: E88LM) -> E88LM:
    """A model with the compiled programs of `model`; all logits are 0."""
    flat = nnx.clone(model)
    flat.embed.embedding[...] = 0 * flat.embed.embedding[...]
    return flat


@nnx.jit
def run(model: E88LM, tokens: Any, state: Any = None) -> Any:
    return model(tokens, state)


def draw(model: E88LM, length: int = 12, prompt: Any = PROMPT, **options: Any) -> Any:
    options.setdefault("key", jax.random.key(KEY))
    return generate(model, prompt, length, **options)


def count_programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each program is run from now on."""
    counts = {}

    def count(name: str) -> None:
        program = getattr(generate_module, name)
        counts[name] = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return program(*arguments, **options)

        monkeypatch.setattr(generate_module, name, counted)

    count("prefill")
    count("decode")
    return counts


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

    @pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 34, 64, np.int64(12), np.uint8(65)])
    def test_lengths_and_streams_begin_alike(self, model: E88LM, length: int) -> None:
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
        self, model: E88LM, length: int, n_blocks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs = count_programs(monkeypatch)
        draw(model, length=length)
        assert programs == {"prefill": int(length > 0), "decode": n_blocks}

    def test_each_token_draws_its_own_number(self, flat: E88LM) -> None:
        """From a flat distribution, a key used twice repeats its token."""
        drawn = draw(flat, length=1 + 2 * BLOCK, temperature=1.0, top_k=None)
        blocks = drawn[:, 1:].reshape(2, 2, BLOCK)
        for one, other in [(blocks[0], blocks[1]), (blocks[:, 0], blocks[:, 1])]:
            assert np.mean(one == other) < 0.2
        assert np.mean(drawn[:, 1:] == drawn[:, :-1]) < 0.2

    def test_options_reach_the_distribution(self, flat: E88LM) -> None:
        """Equal logits are kept lowest ids first."""
        for options, n_kept in [({"top_k": 50}, 50), ({"top_k": None, "top_p": 0.25}, 64)]:
            drawn = draw(flat, length=1 + 2 * BLOCK, **options)
            assert n_kept - 10 < np.max(drawn) < n_kept

    @pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-37])
    def test_low_temperatures_choose_among_equals(self, flat: E88LM, temperature: float) -> None:
        assert len(np.unique(draw(flat, temperature=temperature))) > 5
        assert np.all(draw(flat, temperature=0) == 0)

    def test_memory_is_constant(self, model: E88LM, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = []

        def watched(graphdef: Any, params: Any, state: Any, *a: Any, **k: Any) -> Any:
            shapes.append([x.shape for x in jax.tree.leaves((state, a))])
            return decode(graphdef, params, state, *a, **k)

        monkeypatch.setattr(generate_module, "decode", watched)
        draw(model, length=1 + 3 * BLOCK)
        assert shapes == [shapes[0]] * 3

    def test_lengths_of_prompts_share_programs(self, model: E88LM) -> None:
        draw(model, prompt=np.zeros((2, 9), np.int32), length=1)
        n_programs = prefill._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
        for length in range(10, 16):
            draw(model, prompt=np.zeros((2, length), np.int32), length=1)
        assert prefill._cache_size() == n_programs  # pyright: ignore[reportFunctionMemberAccess]

    @pytest.mark.parametrize(
        ("head_mix", "narrow"),
        [
            ("concat", {"mixer/joined_proj", "mixer/o_proj"}),
            ("input_weighted", {"mixer/joined_proj", "mixer/o_proj"}),
            ("per_head", {"mixer/joined_proj", "mixer/head_projs"}),
        ],
    )
    def test_weights_of_products_are_read_narrow(self, head_mix: Any, narrow: set[str]) -> None:
        options: dict[str, Any] = {"conv_size": 3, "write_gate": True, "head_mix": head_mix}
        layer = E88Config(dim=12, n_heads=3, n_state=4, dtype="bfloat16", **options)
        config = LMConfig(layer=layer, depth=1, vocab_size=19, channel_mixer_dim=8)
        graphdef, params = for_inference(model := E88LM(config, rngs=nnx.Rngs(0)))
        dtypes = {"/".join(map(str, p)): str(x.dtype) for p, x in nnx.to_flat_state(params)}
        narrow |= {f"channel_mixer/{name}_proj" for name in ("up", "gate", "down")}
        expected = {f"blocks/0/{name}/kernel" for name in narrow}
        assert {path for path, dtype in dtypes.items() if dtype == "bfloat16"} == expected
        assert set(dtypes.values()) == {"bfloat16", "float32"}
        if head_mix == "per_head":
            tokens = jnp.zeros((2, 5), jnp.int32)
            logits, _ = run(model, tokens)
            same, _ = run(nnx.merge(graphdef, params), tokens)
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

    def test_the_same_key_typed_or_not(self, model: E88LM) -> None:
        expected = draw(model)
        np.testing.assert_array_equal(draw(model, key=jax.random.PRNGKey(KEY)), expected)
        np.testing.assert_array_equal(draw(model, key=np.asarray([0, KEY], np.uint32)), expected)

    @pytest.mark.parametrize(
        "key",
        [
            0,
            None,
            np.zeros(3, np.uint32),
            np.zeros(2, np.int32),
            jax.random.split(jax.random.key(0), 2),
            jax.random.split(jax.random.PRNGKey(0), 2),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("length", [0, 5])
    def test_bad_keys(self, model: E88LM, key: Any, length: int) -> None:
        with pytest.raises(TypeError, match=r"^key must be one random key.*got "):
            draw(model, length=length, key=key)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -0.1}, r"temperature.*0.*-0\.1"),
            ({"temperature": float("nan")}, "temperature.*nan"),
            ({"temperature": float("inf")}, "temperature.*inf"),
            ({"temperature": True}, "temperature.*True"),
            ({"temperature": None}, "temperature.*None"),
            ({"temperature": "hot"}, "temperature.*'hot'"),
            ({"temperature": np.ones(2)}, "temperature.*ndarray"),
            ({"temperature": 1j}, "temperature.*1j"),
            ({"top_k": 0}, "top_k.*1.*0"),
            ({"top_k": 2.5}, r"top_k.*integer.*2\.5"),
            ({"top_k": 40.0}, r"top_k.*integer.*40\.0"),
            ({"top_k": True}, "top_k.*integer.*True"),
            ({"top_k": float("nan")}, "top_k.*integer.*nan"),
            ({"top_k": np.array([3])}, "top_k.*integer.*ndarray"),
            ({"top_p": 0.0}, r"top_p.*\(0, 1\].*0\.0"),
            ({"top_p": 1.1}, r"top_p.*\(0, 1\].*1\.1"),
            ({"top_p": float("nan")}, "top_p.*nan"),
            ({"top_p": True}, "top_p.*number.*True"),
            ({"top_p": None}, "top_p.*number.*None"),
            ({"top_p": jnp.ones(2)}, r"top_p.*number.*float32 and shape \(2,\)"),
            ({"length": -1}, "length.*0.*-1"),
            ({"length": 2.0}, r"length.*integer.*2\.0"),
            ({"length": True}, "length.*integer.*True"),
            ({"length": None}, "length.*integer.*None"),
            ({"stop": VOCAB}, f"stop.*{VOCAB - 1}.*{VOCAB}"),
            ({"stop": [3, -1]}, "stop.*-1 to 3"),
            ({"stop": 2.5}, r"stop.*ids.*2\.5"),
            ({"stop": True}, "stop.*True"),
            ({"stop": b".\n"}, "stop.*ids.*ord.*b'"),
            ({"stop": [[1, 2], [3, 4]]}, r"stop.*list"),
            ({"stop": {1.5}}, r"stop.*set"),
            ({"stop": "."}, r"stop.*ids.*'\.'"),
            ({"state": ()}, "state.*init_state"),
            ({"state": "state"}, "state.*init_state"),
            ({"model": None}, "model.*E88LM.*None"),
        ],
        ids=str,
    )
    def test_bad_options(self, model: E88LM, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            draw(**{"model": model, **options})

    def test_a_state_of_other_rows(self, model: E88LM) -> None:
        with pytest.raises(ValueError, match=r"state must be.*init_state\(2\)"):
            draw(model, state=model.init_state(3))

    def test_options_as_numpy_has_them(self, model: E88LM) -> None:
        options = {"temperature": np.float32(0.8), "top_k": np.int8(40), "top_p": np.int64(1)}
        np.testing.assert_array_equal(draw(model, **options), draw(model))
        everything = draw(model, top_k=None)
        for top_k in (VOCAB, VOCAB + 1):
            np.testing.assert_array_equal(draw(model, top_k=top_k), everything)


class TestPrompts:
    @pytest.mark.parametrize(
        "prompt",
        [
            PROMPT.tolist(),
            [tuple(row) for row in PROMPT.tolist()],
            list(PROMPT),
            list(jnp.asarray(PROMPT)),
            PROMPT.astype(np.uint8),
            PROMPT.astype(np.int64),
            PROMPT.astype(">u8"),
            PROMPT[:, ::-1][:, ::-1],
            jnp.asarray(PROMPT, jnp.uint16),
        ],
        ids=range(9),
    )
    def test_kinds(self, model: E88LM, prompt: Any) -> None:
        np.testing.assert_array_equal(draw(model, prompt=prompt), draw(model))
        assert draw(model, length=0, prompt=prompt).shape == (2, 0)

    def test_text(self, model: E88LM) -> None:
        text = "déf "
        ids = list(text.encode())
        expected = draw(model, prompt=[ids])
        for prompt in (text, text.encode(), bytearray(ids), [text], (text.encode(),)):
            np.testing.assert_array_equal(draw(model, prompt=prompt), expected)
        both = draw(model, prompt=[ids, [7]])
        np.testing.assert_array_equal(draw(model, prompt=[text, b"\x07"]), both)
        np.testing.assert_array_equal(both[:1], expected)

    def test_text_is_for_models_of_bytes(self) -> None:
        layer = E88Config(dim=4, n_heads=1, n_state=4)
        other = E88LM(LMConfig(layer=layer, depth=1, vocab_size=300), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"bytes.*300.*ids"):
            draw(other, prompt="def ")

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (np.zeros((2, 0), np.int32), r"^prompt must .*\(2, 0\)"),
            (np.zeros((0, 2), np.int32), r"^prompt must .*\(0, 2\)"),
            (np.zeros(5, np.int32), r"^prompt must .*\(5,\)"),
            ([1, 2, 3], r"^prompt must .*\(3,\)"),
            (7, r"^prompt must .*\(\)"),
            (None, "^prompt must .*object"),
            ([], "^prompt must .*"),
            (np.zeros((1, 3), np.float32), "^prompt must .*float32"),
            (np.zeros((1, 3), bool), "^prompt must .*bool"),
            ([[1, 2], [3.5, 4.0]], "^prompt must .*float64"),
            ([[1, 2], []], r"^row 1 of the prompt .*\(0,\)"),
            ([[1, 2], [0.5]], "^row 1 of the prompt .*float64"),
            (["a", ""], r"^row 1 of the prompt .*\(0,\)"),
            ("", r"^row 0 of the prompt .*\(0,\)"),
            ([b"a", 7], r"^row 1 of the prompt .*\(\)"),
            ([[1, [2, 3]], [1]], "^each row of the prompt "),
            ([[-1, 2, 3]], f"^the prompt's ids .*{VOCAB - 1}, got -1 to 3"),
            ([[VOCAB]], f"^the prompt's ids .*{VOCAB - 1}, got {VOCAB} to {VOCAB}"),
            ([[1, 2], [VOCAB]], f"^the prompt's ids .*{VOCAB - 1}, got {VOCAB} to {VOCAB}"),
            ([[2**63, 2**64 - 1]], f"^the prompt's ids .*{VOCAB - 1}"),
        ],
        ids=str,
    )
    def test_bad_prompts(self, model: E88LM, prompt: Any, message: str) -> None:
        """Refused by the call, not by the first token."""
        with pytest.raises(ValueError, match=message):
            generate_stream(model, prompt, key=jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            draw(model, length=0, prompt=prompt)

    @pytest.mark.parametrize(
        ("prompt", "lengths", "message"),
        [
            (PROMPT, [0, 5], r"lengths.*1 to .*5.*0 to 5"),
            (PROMPT, [1, 6], r"lengths.*1 to .*5.*1 to 6"),
            (PROMPT, [1], r"lengths.*2 integers.*\(1,\)"),
            (PROMPT, 5, r"lengths.*2 integers.*\(\)"),
            (PROMPT, [1.0, 5.0], r"lengths.*2 integers.*float64"),
            (PROMPT, [True, True], r"lengths.*2 integers.*bool"),
            ([[1], [2, 3]], [1, 2], "lengths must be None"),
            ("text", [4], "lengths must be None"),
        ],
        ids=str,
    )
    def test_bad_lengths(self, model: E88LM, prompt: Any, lengths: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            draw(model, prompt=prompt, lengths=lengths)

    def test_rows_of_different_lengths_are_as_if_alone(self, model: E88LM) -> None:
        rows = [[3], list(range(11)), [9] * 16, [200, 100]]
        together = draw(model, prompt=rows)
        for b, row in enumerate(rows):
            others = [row if i == b else [1, 2, 3] for i in range(4)]
            drawn = draw(model, prompt=others)
            np.testing.assert_array_equal(drawn[b], together[b])
        alone = draw(model, prompt=rows[:1])
        np.testing.assert_array_equal(alone, together[:1])
        # What the padding holds is not looked at, be it an id or not.
        padded = np.full((4, 40), -100)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        for lengths in (
            [1, 11, 16, 2],
            jnp.asarray([1, 11, 16, 2]),
            np.array([1, 11, 16, 2], "u1"),
        ):
            drawn = draw(model, prompt=padded, lengths=lengths)
            np.testing.assert_array_equal(drawn, together)

    def test_padded_lengths(self) -> None:
        lengths = np.arange(1, 4097)
        sizes = np.array([padded_length(n) for n in lengths.tolist()])
        assert len(set(sizes.tolist())) == 5 + 4 * 8
        assert np.all(sizes >= lengths)
        assert np.all(sizes[16:] < 1.25 * lengths[16:])
        assert [padded_length(2**n) for n in range(20)] == [2**n for n in range(20)]


class TestState:
    def test_a_state_is_what_a_prompt_continues(self, model: E88LM) -> None:
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
    def test_the_state_returned_is_after_the_tokens(self, model: E88LM, length: int) -> None:
        drawn, state = draw(model, length, return_state=True)
        np.testing.assert_array_equal(drawn, draw(model, length))
        tokens = np.concatenate([PROMPT, drawn], axis=1)
        assert_close(state, state_after(model, tokens))

    def test_token_0_is_a_token(self, flat: E88LM) -> None:
        before = jax.tree.map(lambda x: x + 0.5, flat.init_state(2))
        options: dict[str, Any] = {"state": before, "return_state": True}
        drawn, state = draw(flat, 7, temperature=0, **options)
        assert np.all(drawn == 0)
        reads_all = draw(flat, 0, np.pad(PROMPT, ((0, 0), (0, 7))), **options)[1]
        assert_close(state, reads_all)

    def test_of_rows_that_ended(self, model: E88LM) -> None:
        prompts = [PROMPT[0], PROMPT[1, :3]]
        stop = draw(model, prompt=prompts)[0, 3]
        drawn, state = draw(model, prompt=prompts, stop=stop, return_state=True)
        for b, prompt in enumerate(prompts):
            tokens = np.concatenate([prompt, drawn[b][drawn[b] != ENDED]])
            its_state = [x[b : b + 1] for x in jax.tree.leaves(state)]
            assert_close(its_state, jax.tree.leaves(state_after(model, tokens[None])))


def state_after(model: E88LM, tokens: np.ndarray) -> Any:
    state = None
    for t in range(tokens.shape[1]):
        _, state = run(model, jnp.asarray(tokens[:, t : t + 1]), state)
    return state


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


class TestStop:
    def test_rows_end_at_their_first_stop_token(self, model: E88LM) -> None:
        whole = draw(model, length=1 + BLOCK)
        stop = np.unique(whole[:, 2])
        drawn = draw(model, length=1 + BLOCK, stop=stop)
        for row, full in zip(drawn, whole, strict=True):
            n_drawn = 1 + int(np.argmax(np.isin(full, stop)))
            np.testing.assert_array_equal(row[:n_drawn], full[:n_drawn])
            assert np.all(row[n_drawn:] == ENDED)
        for same in (set(stop.tolist()), tuple(stop), jnp.asarray(stop), iter(stop.tolist())):
            np.testing.assert_array_equal(draw(model, length=1 + BLOCK, stop=same), drawn)

    def test_numbers_of_stop_tokens_share_programs(self, model: E88LM) -> None:
        draw(model, length=2, stop=range(8))
        n_programs = decode._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
        for n in (5, 6, 7):
            draw(model, length=2, stop=range(n))
        assert decode._cache_size() == n_programs  # pyright: ignore[reportFunctionMemberAccess]

    def test_none_of_them_drawn(self, model: E88LM) -> None:
        expected = draw(model)
        never = np.setdiff1d(np.arange(VOCAB), expected)
        for stop in ([], never, int(never[0])):
            np.testing.assert_array_equal(draw(model, stop=stop), expected)

    def test_the_first_token_and_the_last_of_the_prompt(self, model: E88LM) -> None:
        """A stop token of the prompt ends nothing."""
        first = draw(model, length=3, temperature=0)
        drawn = draw(model, length=3, temperature=0, stop=first[:, 0])
        np.testing.assert_array_equal(drawn[:, 0], first[:, 0])
        assert np.all(drawn[:, 1:] == ENDED)
        drawn = draw(model, length=3, temperature=0, stop=np.unique(PROMPT))
        np.testing.assert_array_equal(drawn[:, 0], first[:, 0])

    def test_generation_ends_with_the_last_row(
        self, model: E88LM, monkeypatch: pytest.MonkeyPatch
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
    def test_weights(self, model: E88LM, value: float, temperature: float) -> None:
        broken = nnx.clone(model)
        broken.embed.embedding[...] = broken.embed.embedding[...].at[3, 1].set(value)
        with pytest.raises(ValueError, match=r"logits of row 0 .*not finite.*weights"):
            draw(broken, temperature=temperature)
        with pytest.raises(ValueError, match="not finite"):
            next(generate_stream(broken, PROMPT, key=jax.random.key(0), temperature=temperature))

    def test_a_state(self, model: E88LM) -> None:
        state = jax.tree.map(lambda x: x.at[1].set(jnp.nan), model.init_state(2))
        with pytest.raises(ValueError, match="row 1"):
            draw(model, state=state)

    def test_after_the_length_it_is_no_error(
        self, model: E88LM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks go past the tokens asked for."""

        def decode(graphdef: Any, params: Any, state: Any, token: Any, key: Any, **_: Any) -> Any:
            block = np.full((2, BLOCK), 65, np.int32)
            block[1, 3:] = [NOT_FINITE] + [ENDED] * (BLOCK - 4)
            return state, block, key

        monkeypatch.setattr(generate_module, "decode", decode)
        assert draw(model, length=4).shape == (2, 4)
        with pytest.raises(ValueError, match="row 1"):
            draw(model, length=5)


class TestOnAMesh:
    def test_rows_and_parameters_divided(self, model: E88LM) -> None:
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
    def test_it_is_as_without(self, model: E88LM) -> None:
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
    def test_arguments_that_are_constants(self, model: E88LM, length: int) -> None:
        drawn = jax.jit(lambda: draw(model, length, PROMPT.tolist()))()
        np.testing.assert_array_equal(drawn, draw(model, length))

    def test_what_it_refuses(self, model: E88LM) -> None:
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


jitted_filter = jax.jit(filter_logits, static_argnums=2)


class TestFilterLogits:
    LOGITS = np.random.default_rng(3).normal(size=(5, 30)).astype(np.float32) * 3

    def probabilities(self, logits: Any, **options: Any) -> np.ndarray:
        temperature = jnp.float32(options.get("temperature", 1.0))
        top_p = jnp.float32(options.get("top_p", 1.0))
        filtered = jitted_filter(jnp.asarray(logits), temperature, options.get("top_k"), top_p)
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
        for top_p, kept in [
            (1e-9, [1]),
            (0.4, [1]),
            (0.6, [1, 2]),
            (0.74, [1, 2]),
            (0.76, [0, 1, 2]),
        ]:
            assert np.flatnonzero(self.probabilities(logits, top_p=top_p)).tolist() == kept

    def test_everything_is_kept_by_default(self) -> None:
        """Also what is too unlikely for a float32 sum of probabilities to notice."""
        logits = np.array([[0.0, -20.0, -30.0, -80.0]], np.float32)
        assert np.all(self.probabilities(logits) > 0)

    def test_equal_logits_are_cut_lowest_ids_first(self) -> None:
        for top_k in (1, 41, 61):
            probabilities = self.probabilities(np.zeros((1, 60), np.float32), top_k=top_k)
            assert np.flatnonzero(probabilities).tolist() == list(range(min(top_k, 60)))
        for n in (10, 60):
            n_kept = 1 + np.arange(n)[:, None]
            probabilities = self.probabilities(np.zeros((n, n), np.float32), top_p=n_kept / n)
            np.testing.assert_array_equal(probabilities > 0, np.arange(n)[None, :] < n_kept)

    def test_ties_at_the_cut(self) -> None:
        logits = np.array([[1, 3, 1, 2, 1], [-0.0, 0.0, 0.0, -0.0, -1]], np.float32)
        for top_k, kept in [(1, [[1], [0]]), (3, [[0, 1, 3], [0, 1, 2]])]:
            probabilities = self.probabilities(logits, top_k=top_k)
            assert [np.flatnonzero(row).tolist() for row in probabilities] == kept

    def test_filters_together(self) -> None:
        """The probability is of what top_k leaves."""
        probabilities = self.probabilities(np.zeros((1, 8), np.float32), top_k=4, top_p=0.5)
        assert np.flatnonzero(probabilities).tolist() == [0, 1]

    def test_a_vanishing_temperature_is_greedy(self, model: E88LM) -> None:
        greedy = draw(model, temperature=0.0)
        for temperature in (1e-40, 1e-37, np.float64(5e-324)):
            np.testing.assert_array_equal(draw(model, temperature=temperature), greedy)
