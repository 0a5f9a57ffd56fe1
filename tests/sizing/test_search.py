import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e88_jax.config import OutputGate
from e88_jax.hardware import GPU, GPUS, find_gpu
from e88_jax.sizing import d_inner_of, e88_layer, parse_params, solve
from e88_jax.sizing.search import usual_depth

# A search depends on a GPU by these alone.
GPUS_APART = [None, *{gpu.recommended_n_state: gpu for gpu in GPUS}.values()]


@settings(max_examples=35, deadline=None, derandomize=True, database=None)
@given(
    st.floats(6, 10).map(lambda x: round(10**x)),
    st.sampled_from(GPUS_APART),
    st.sampled_from(["silu", "none"]),
)
def test_any_budget_is_met(budget: int, gpu: GPU | None, gate: OutputGate) -> None:
    solutions = solve(budget, gpu=gpu, gate=gate)
    for solution in solutions:
        config, layer = solution.config, e88_layer(solution.config)
        assert config.count_params() == solution.params
        assert abs(solution.params / budget - 1) <= 0.01
        assert config.dim % 64 == 0
        assert layer.n_state % 4 == 0
        assert layer.output_gate == gate
    distances = [solution.distance for solution in solutions]
    assert distances == sorted(distances)
    assert len({solution.config for solution in solutions}) == len(solutions)


@pytest.mark.parametrize("budget", [25 * 10**6, 10**8, 5 * 10**8, 10**9, 10**10])
def test_from_25m_on_the_first_is_balanced(budget: int) -> None:
    for gpu in GPUS_APART:
        first = solve(budget, gpu=gpu)[0].config
        assert 0.8 <= first.dim / d_inner_of(first) <= 1.2


def test_what_is_given_is_kept() -> None:
    for depth, n_state, vocab_size in itertools.product((12, 24), (16, 64), (256, 32_000)):
        for solution in solve(200_000_000, depth=depth, n_state=n_state, vocab_size=vocab_size):
            config = solution.config
            assert (config.depth, e88_layer(config).n_state) == (depth, n_state)
            assert config.vocab_size == vocab_size


def test_small_models_may_be_twice_as_deep_as_usual() -> None:
    """Few multiples of 64 give such a count: then other depths must do."""
    budget = 2_479_171
    depths = {solution.config.depth for solution in solve(budget)}
    assert (min(depths), max(depths)) == (1, 2 * usual_depth(budget))


@pytest.mark.parametrize(
    ("params", "depth"),
    [
        (10**4, 2),
        (10**7, 9),
        (99_999_999, 20),
        (10**8, 20),
        (749_999_999, 20),
        (750_000_000, 24),
        (10**9, 24),
        (8 * 10**9, 48),
    ],
)
def test_the_usual_depth(params: int, depth: int) -> None:
    assert usual_depth(params) == depth


def test_n_state_suits_the_gpu() -> None:
    for gpu in (find_gpu("a100-80gb"), find_gpu("h100"), find_gpu("l40s")):
        found = solve(500_000_000, gpu=gpu)
        n_states = {e88_layer(solution.config).n_state for solution in found}
        assert n_states == set(gpu.recommended_n_state)


@pytest.mark.parametrize(
    ("params", "options", "fragments"),
    [
        (-5, {}, ["1M to 10B", "-5"]),
        (10**11, {}, ["1M to 10B", "100,000,000,000"]),
        (10**8, {"n_state": 30}, ["multiple of 4", "30"]),
        (10**8, {"n_state": 132}, ["128", "132"]),
        (10**8, {"depth": 0}, ["depth", "at least 1", "0"]),
        (10**8, {"vocab_size": -1}, ["vocab_size", "-1"]),
        (10**6, {"depth": 20, "n_state": 32}, ["depth 20", "n_state 32", "nearest has 859,856"]),
        (10**6, {"vocab_size": 50_000}, ["50,000 ids", "3,200,000"]),
    ],
)
def test_what_cannot_be_had_says_why(
    params: int, options: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (fragments below)
        solve(params, **options)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("text", "params"),
    [("500M", 500_000_000), ("1.3b", 1_300_000_000), ("250k", 250_000), ("12345", 12_345)],
)
def test_budgets_as_people_write_them(text: str, params: int) -> None:
    assert parse_params(text) == params


@pytest.mark.parametrize("text", ["", "many", "5T", "1e9", "5 0"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="a budget is a number such as 500M"):
        parse_params(text)
