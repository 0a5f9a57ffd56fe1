"""Prompt, draws and counts of programs that the tests of sampling share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import sampling
from e88_jax.model import LanguageModel
from e88_jax.sampling import generate

VOCAB = 256
KEY = 7
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)


@nnx.jit
def run(model: LanguageModel, tokens: Any, state: Any = None) -> Any:
    return model(tokens, state)


def draw(model: LanguageModel, length: int = 12, prompt: Any = PROMPT, **options: Any) -> Any:
    options.setdefault("key", jax.random.key(KEY))
    return generate(model, prompt, length, **options)


def cache_size(program: Any) -> int:
    """How many programs a jitted function has compiled."""
    return program._cache_size()


def count_programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each program is run from now on."""
    counts = {}

    def count(name: str) -> None:
        program = getattr(sampling, name)
        counts[name] = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return program(*arguments, **options)

        monkeypatch.setattr(sampling, name, counted)

    count("prefill")
    count("decode")
    return counts


def state_after(model: LanguageModel, tokens: np.ndarray) -> Any:
    state = None
    for t in range(tokens.shape[1]):
        _, state = run(model, jnp.asarray(tokens[:, t : t + 1]), state)
    return state


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
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
