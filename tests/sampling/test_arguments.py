"""Prompts, keys and options: what is taken, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.model import LanguageModel
from e88_jax.prompts import padded_length
from e88_jax.sampling import (
    generate_stream,
)
from tests.reference.configs import lm_config
from tests.sampling.common import (
    PROMPT,
    VOCAB,
    draw,
)


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
    def test_kinds(self, model: LanguageModel, prompt: Any) -> None:
        np.testing.assert_array_equal(draw(model, prompt=prompt), draw(model))
        assert draw(model, length=0, prompt=prompt).shape == (2, 0)

    def test_text(self, model: LanguageModel) -> None:
        text = "déf "
        ids = list(text.encode())
        expected = draw(model, prompt=[ids])
        for prompt in (text, text.encode(), bytearray(ids), [text], (text.encode(),)):
            np.testing.assert_array_equal(draw(model, prompt=prompt), expected)
        both = draw(model, prompt=[ids, [7]])
        np.testing.assert_array_equal(draw(model, prompt=[text, b"\x07"]), both)
        np.testing.assert_array_equal(both[:1], expected)

    def test_text_is_for_models_of_bytes(self) -> None:
        config = lm_config(dim=4, n_heads=1, vocab_size=300)
        other = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
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
    def test_bad_prompts(self, model: LanguageModel, prompt: Any, message: str) -> None:
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
    def test_bad_lengths(
        self, model: LanguageModel, prompt: Any, lengths: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            draw(model, prompt=prompt, lengths=lengths)

    def test_rows_of_different_lengths_are_as_if_alone(self, model: LanguageModel) -> None:
        rows = [[3], list(range(11)), [9] * 16, [200, 100]]
        together = draw(model, prompt=rows)
        for b in (0, 2, 3):  # two of them among rows that are padded to less
            others = [rows[b] if i == b else [1, 2, 3] for i in range(4)]
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


class TestRefusals:
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
    def test_bad_keys(self, model: LanguageModel, key: Any, length: int) -> None:
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
            ({"model": None}, "model.*LanguageModel.*None"),
        ],
        ids=str,
    )
    def test_bad_options(self, model: LanguageModel, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            draw(**{"model": model, **options})

    def test_a_state_of_other_rows(self, model: LanguageModel) -> None:
        with pytest.raises(ValueError, match=r"state\[0\] must be E88State.*for a batch of 2, got"):
            draw(model, state=model.init_state(3))
