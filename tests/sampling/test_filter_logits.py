from typing import Any

import jax
import numpy as np
import pytest

from e88_jax.draw import filter_logits
from e88_jax.model import LanguageModel
from tests.sampling.common import draw, numpy_filter

probabilities_of = jax.jit(
    lambda *arguments: jax.nn.softmax(filter_logits(*arguments), axis=-1), static_argnums=2
)


class TestFilterLogits:
    LOGITS = np.random.default_rng(3).normal(size=(5, 30)).astype(np.float32) * 3

    def probabilities(self, logits: Any, **options: Any) -> np.ndarray:
        temperature, top_p = (
            np.asarray(options.get(name, 1.0), np.float32) for name in ("temperature", "top_p")
        )
        return np.asarray(probabilities_of(logits, temperature, options.get("top_k"), top_p))

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

    def test_a_vanishing_temperature_is_greedy(self, model: LanguageModel) -> None:
        greedy = draw(model, temperature=0.0)
        for temperature in (1e-40, 1e-37, np.float64(5e-324)):
            np.testing.assert_array_equal(draw(model, temperature=temperature), greedy)
