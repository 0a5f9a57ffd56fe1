"""Models with weights set by hand against independent programs."""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.model import LanguageModel
from experiments import cli
from experiments.trials import constructions, horizons
from experiments.trials.hand_set import SMALL, silu_inverse

LENGTH = 4096
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def strict_dtype_promotion(standard_dtype_promotion: None) -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def add(modulus: int) -> Callable[[int, int], int]:
    return lambda state, x: (state + x) % modulus


def compose(tokens: list[tuple[int, ...]]) -> Callable[[int, int], int]:
    """First the permutation so far, then the token's; numbers are places in lexicographic order."""
    elements = list(itertools.permutations(range(len(tokens[0]))))

    @functools.cache
    def step(state: int, x: int) -> int:
        return elements.index(tuple(tokens[x][i] for i in elements[state]))

    return step


SWAPS = [(1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 4, 3)]
S_3 = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]

# Name, model, tokens, one step of the program, and the length that bfloat16 is right for: keys at
# angles of pi x / K are not exact in it.
TRACKERS: dict[str, tuple[Callable[..., LanguageModel], int, Callable[[int, int], int], int]] = {
    "parity": (constructions.parity, 2, add(2), LENGTH),
    "parity, linear": (
        functools.partial(constructions.parity, linear_state=True, amplitude=1.0),
        2,
        add(2),
        LENGTH,
    ),
    "flip-flop": (constructions.flip_flop, 2, add(2), LENGTH),
    "error correcting": (constructions.error_correcting_parity, 2, add(2), LENGTH),
    "counter 3": (functools.partial(constructions.counter, 3), 3, add(3), LENGTH),
    "counter 4": (constructions.counter_4, 4, add(4), LENGTH),
    "counter 5": (functools.partial(constructions.counter, 5), 5, add(5), 100),
    "counter 20": (functools.partial(constructions.counter, 20), 20, add(20), 20),
    "s3": (constructions.symmetric_group_3, 6, compose(S_3), LENGTH),
    "s5 swaps": (constructions.adjacent_swaps, 4, compose(SWAPS), LENGTH),
    "s3, tanh": (
        functools.partial(
            constructions.symmetric_group_3, linear_state=False, amplitude=SMALL, use_silu=False
        ),
        6,
        compose(S_3),
        LENGTH,
    ),
}


def inputs(n_tokens: int, length: int = LENGTH) -> np.ndarray:
    """Random rows, rows of one token, of two in turn, and of a long run between random tokens."""
    rng = np.random.default_rng(length)
    rows = list(rng.integers(0, n_tokens, (3, length)))
    rows += [np.full(length, x) for x in {0, 1, n_tokens - 1}]
    rows += [np.arange(length) % 2, np.arange(length) % n_tokens]
    run = rng.integers(0, n_tokens, length)
    run[length // 10 : -length // 10] = n_tokens - 1
    return np.stack([*rows, run])


def answers(step: Callable[[int, int], int], tokens: np.ndarray) -> np.ndarray:
    def of(row: np.ndarray) -> list[int]:
        return list(itertools.accumulate(map(int, row), step, initial=0))[1:]

    return np.array([of(row) for row in tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRACKERS)
def test_every_answer_is_right(name: str, dtype: str) -> None:
    build, n_tokens, step, in_bfloat16 = TRACKERS[name]
    length = LENGTH if dtype == "float32" else in_bfloat16
    tokens = inputs(n_tokens, length)
    margins = horizons.margins(build(dtype=dtype), tokens, answers(step, tokens))
    assert margins.shape == tokens.shape
    assert margins.min() > (0.9 if length == LENGTH else 0)


@pytest.mark.parametrize(
    ("name", "length"), [("error correcting", 1000), ("counter 5", 7), ("s5 swaps", 128)]
)
def test_one_call_of_any_length_is_right(name: str, length: int) -> None:
    build, n_tokens, step, _ = TRACKERS[name]
    tokens = inputs(n_tokens, length)[-5:]
    logits, _ = nnx.jit(build())(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), answers(step, tokens))


@pytest.mark.parametrize("n", [2, 3])
def test_swaps_of_fewer_things(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, n - 1, (3, 50))
    right = answers(compose([x[:n] for x in SWAPS[: n - 1]]), tokens)
    assert horizons.margins(constructions.adjacent_swaps(n), tokens, right).min() > 0.99


def test_unsaturated_decays_are_enough_for_as_long_as_their_input_s_exponential() -> None:
    tokens = inputs(2)
    right = answers(add(2), tokens)
    for saturation in (3.0, 5.0, 7.0):
        model = constructions.parity(linear_state=True, saturation=saturation)
        found = horizons.horizon(horizons.margins(model, tokens, right))
        assert 1 < found / np.exp(saturation) < 4


def state_after(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """The state of the last layer's first head, `[B, N, V]`."""
    _, state = nnx.jit(model)(jnp.asarray(tokens, jnp.int32))
    return np.asarray(state[-1].recurrent[:, 0])


@pytest.mark.parametrize(
    ("build", "n_tokens"),
    [
        (constructions.adjacent_swaps, 4),
        (functools.partial(constructions.symmetric_group_3, use_silu=False), 6),
        (constructions.parity, 2),
    ],
)
def test_states_are_exact_after_any_number_of_steps(
    build: Callable[..., LanguageModel], n_tokens: int
) -> None:
    sizes = np.abs(state_after(build(), inputs(n_tokens)))
    assert len(np.unique(sizes)) == 2  # 0 and the amplitude


@pytest.mark.parametrize(
    ("build", "n_tokens"), [(constructions.parity, 2), (constructions.adjacent_swaps, 4)]
)
def test_at_a_small_amplitude_tanh_is_the_linear_twin_bit_for_bit(
    build: Callable[..., LanguageModel], n_tokens: int
) -> None:
    linear, tanh = (
        state_after(build(linear_state=x, amplitude=SMALL), inputs(n_tokens)) for x in (True, False)
    )
    np.testing.assert_array_equal(linear, tanh)
    assert np.abs(linear).max() > 0


@pytest.mark.parametrize(
    ("build", "n_tokens", "step"),
    [
        (constructions.parity, 2, add(2)),
        (functools.partial(constructions.counter, 5), 5, add(5)),
        (constructions.adjacent_swaps, 4, compose(SWAPS)),
    ],
)
def test_with_tanh_the_horizon_falls_as_the_amplitude_s_square(
    build: Callable[..., LanguageModel], n_tokens: int, step: Callable[[int, int], int]
) -> None:
    tokens = inputs(n_tokens)
    right = answers(step, tokens)
    found = [
        horizons.horizon(
            horizons.margins(build(linear_state=False, amplitude=amplitude), tokens, right)
        )
        for amplitude in (0.16, 0.08)
    ]
    assert 2 < found[1] / found[0] < 8
    assert found[1] < LENGTH


def test_ones_restore_the_flip_flop_and_not_its_linear_twin() -> None:
    starts = np.array([-1.0, -0.3, -0.01, 0.02, 0.5, 1.0])
    ones = jnp.ones((len(starts), 31), jnp.int32)
    found = {}
    for name, model in (
        ("tanh", constructions.flip_flop()),
        ("linear", constructions.parity(linear_state=True, amplitude=1.0)),
    ):
        (state,) = model.init_state(len(starts))
        recurrent = state.recurrent.at[:, 0].set(jnp.asarray(starts, jnp.float32)[:, None, None])
        _, (state,) = nnx.jit(model)(ones, (state._replace(recurrent=recurrent),))
        found[name] = np.asarray(state.recurrent[:, 0, 0, 0])
    stable = 0.957504  # tanh(2 x) = x
    np.testing.assert_allclose(found["tanh"], -np.sign(starts) * stable, rtol=1e-3)
    np.testing.assert_allclose(found["linear"], 1 - starts, atol=1e-6)


def test_noise_is_corrected_by_tanh_with_gate_2_and_adds_up_in_the_linear_twin() -> None:
    tokens = inputs(2)
    right = answers(add(2), tokens)

    def found(model: LanguageModel) -> int:
        return horizons.horizon(horizons.margins(model, tokens, right, noise=0.05))

    assert found(constructions.error_correcting_parity()) == LENGTH
    assert found(constructions.parity(linear_state=True, amplitude=1.0)) < 1000


def test_silu_has_an_inverse_down_to_its_minimum() -> None:
    y = np.array([[-0.278, -1e-3, 0.0, 1e-9, 0.3, 5.0, 64.0]])
    x = silu_inverse(y)
    np.testing.assert_allclose(x / (1 + np.exp(-x)), y, rtol=1e-9)
    with pytest.raises(ValueError, match=r"SiLU is at least -0\.278, got -0\.3"):
        silu_inverse(-0.3)


def test_tokens_that_turn_need_a_mirror_and_all_must_be_orthogonal() -> None:
    turn, shear = np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([[-1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(ValueError, match="tokens of determinant 1 need a mirror"):
        constructions.track([turn], [turn], [1.0, 0.0])
    with pytest.raises(ValueError, match="not a reflection"):
        constructions.track([shear], [shear], [1.0, 0.0])


def test_the_program_prints_its_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_cases = horizons.cases()
    for name, few in (
        ("cases", lambda: [all_cases[i] for i in (0, 3, 5)]),
        ("DTYPES", ("float32",)),
        ("AMPLITUDES", (SMALL,)),
        ("SATURATIONS", (9.0,)),
        ("NOISES", (0.001,)),
    ):
        monkeypatch.setattr(horizons, name, few)
    constructions.main(["--length", "3", "--sequences", "1"])
    first, second, third, fourth = capsys.readouterr().out.split("\n\n")
    assert [line.split(" | ")[4] for line in first.splitlines()[2:]] == ["all 3"] * 3
    assert second.count("all 3") == 3
    assert third.count("all 3") == 1
    assert fourth.count("all 3") == 2


def test_the_program_refuses_no_tokens() -> None:
    with pytest.raises(cli.errors.UsageError, match="--length must be at least 1"):
        constructions.main(["--length", "0"])
