"""Steps of the proofs about what E88 layers track, and limits that no weights overcome."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution, MixerConfig
from e88_jax.mixers.baselines import GatedDeltaNetConfig
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel
from experiments.trials import constructions


@pytest.fixture(autouse=True)
def strict_dtype_promotion(standard_dtype_promotion: None) -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@dataclasses.dataclass
class Steps:
    """Keys, values and gates of a layer's first head, by step."""

    key: np.ndarray
    value: np.ndarray
    decay: np.ndarray
    write_gate: np.ndarray

    @classmethod
    def of(cls, mixer: Any, x: jax.Array) -> "Steps":
        """The steps of an `E88Mixer` with a write gate for x `[B, T, dim]`."""
        return cls(*(np.asarray(a, np.float64) for a in _steps(mixer, x)))


@nnx.jit
def _steps(mixer: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    (y, others), config = mixer.inputs(x), mixer.config
    n, columns = config.n_state, config.head_columns
    k, v = y[:, :, n : 2 * n], y[:, :, 2 * n : columns]
    k = jax.nn.silu(k)
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-6
    read = mixer.inputs.split(y[:, :, config.n_heads * columns :], others)
    decay = jax.nn.sigmoid(-read.decay[:, :, 0])
    write_gate = config.write_gate_scale * jax.nn.sigmoid(read.write_gate[:, :, 0])
    return k, jax.nn.silu(v), decay, write_gate


def test_the_sign_s_intervals_are_invariant_under_noise() -> None:
    """Corners of the boxes s_0 in +-[low, 1], |s_1|, |s_2| <= side at odd and at even steps are
    taken into each other: each entry after a step is monotone in each entry before it."""
    model, noise = constructions.error_correcting_parity(), 0.03
    tokens = np.array(list(itertools.product([0, 1], repeat=10)))
    first, second = model.blocks
    x = model.embed(jnp.asarray(tokens, jnp.int32))
    x += nnx.jit(lambda block, x: block.mixer(block.norm(x))[0])(first, x)
    steps = Steps.of(second.mixer, second.norm(x))
    # After step t: the box's low end and side.
    boxes = [(0.9, 0.06)] + 5 * [(0.35, 0.2), (0.5, 0.07)]

    def corners(low: float, side: float) -> np.ndarray:
        ends = [low, 1 + noise], [-side, side], [-side, side]
        return np.array(list(itertools.product(*ends)))

    for t in range(tokens.shape[1]):
        k, d = steps.key[:, t], steps.decay[:, t, None, None]
        beta, v = steps.write_gate[:, t, None, None], steps.value[:, t, 0]
        keeps = (t % 2 == 1) & (tokens[:, t] != tokens[:, t - 1])
        for sign in (1, -1):
            s = sign * corners(*boxes[t - 1]) if t else np.zeros((1, 3))
            delta = v[:, None] - k @ s.T  # [rows, corners]
            after = np.tanh(d * s[None] + beta * k[:, None, :] * delta[:, :, None])
            expected = np.where(keeps, sign, -sign) if t else np.ones(len(k))
            low, side = boxes[t]
            assert (after[:, :, 0] * expected[:, None]).min() - noise > low, t
            assert np.abs(after[:, :, 1:]).max() + noise < side, t


def energy(m: np.ndarray, b: np.ndarray, now: np.ndarray, before: np.ndarray) -> float:
    def f(x: np.ndarray) -> np.ndarray:
        return x * np.arctanh(x) + np.log1p(-(x**2)) / 2

    return float(-now @ m @ before - b @ (now + before) + np.sum(f(now) + f(before)))


@pytest.mark.parametrize("seed", range(5))
def test_the_energy_of_one_repeated_token_falls_by_half_the_squared_change(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = rng.normal(size=6)
    k /= np.linalg.norm(k)
    m = rng.uniform(0, 1) * np.eye(6) - rng.uniform(0, 2) * np.outer(k, k)
    b, states = rng.normal() * k, [rng.uniform(-0.9, 0.9, 6)]
    for _ in range(400):
        states.append(np.tanh(m @ states[-1] + b))
    energies = np.array([energy(m, b, *pair) for pair in zip(states[1:], states, strict=False)])
    changes = np.array([np.sum((x - y) ** 2) for x, y in zip(states[2:], states, strict=False)])
    assert (np.diff(energies) <= -changes / 2 + 1e-12).all()
    assert changes[-1] < 1e-6


def random_layer(config: E88Config, seed: int) -> E88Mixer:
    """A layer with weights large enough for fast decays and write gates near their ends."""
    mixer = nnx.jit(lambda: E88Mixer(config, 16, rngs=nnx.Rngs(seed)))()
    nnx.update(mixer, jax.tree.map(lambda x: 4 * x, nnx.state(mixer, nnx.Param)))
    mixer.decay.A_log[...] = jnp.zeros(config.n_heads)
    mixer.decay.dt_bias[...] = jnp.zeros(config.n_heads)
    return mixer


@pytest.mark.parametrize("conv_size", [None, 4])
def test_one_layer_becomes_periodic_with_period_2_on_one_token(conv_size: int | None) -> None:
    config = E88Config(
        n_heads=6, n_state=5, write_gate=True, write_gate_scale=2.0, conv_size=conv_size
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 1, 16)), jnp.float32)
    y, _ = nnx.jit(random_layer(config, 0))(jnp.broadcast_to(x, (9, 3000, 16)))
    y = np.asarray(y)[:, -4:]
    np.testing.assert_allclose(y[:, 2:], y[:, :2], atol=1e-4)
    assert np.abs(y[:, 1] - y[:, 0]).max() > 1  # and not with period 1


MIXERS: dict[str, MixerConfig] = {
    "e88": E88Config(n_heads=4, n_state=5),
    "e88, linear": E88Config(n_heads=4, n_state=5, linear_state=True),
    "gated deltanet": GatedDeltaNetConfig(n_heads=2, head_dim=6, negative_eigenvalues=True),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_stacks_that_contract_forget_how_often_one_token_came(mixer: str) -> None:
    config = LMConfig(
        dim=12, depth=3, layers=(MIXERS[mixer],), vocab_size=5, execution=Execution(dtype="float32")
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 50.0
    for block in model.blocks:  # decays near 1/2: others take longer
        decay: Any = getattr(block.mixer, "decay")  # noqa: B009
        for parameter in (decay.A_log, decay.dt_bias):
            parameter[...] = jnp.zeros_like(parameter[...])
    tokens = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 1500))
    logits, _ = nnx.jit(model)(tokens)
    changes = np.abs(np.diff(np.asarray(logits), axis=1)).max(axis=(0, 2))
    assert changes[0] > 0.1
    assert changes[-1] < 1e-4


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_two_steps_turn_only_as_they_shrink(largest: float) -> None:
    """Eigenvalues of (d I - beta k k^T) (d' I - beta' k' k'^T) that are not real are of size
    beta beta' / 4 at most."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(4000, 2, 4))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    decay, beta = rng.uniform(0, 1, (4000, 2)), rng.uniform(0, largest, (4000, 2))
    outer = beta[..., None, None] * keys[..., :, None] * keys[..., None, :]
    steps = decay[..., None, None] * np.eye(4) - outer
    found = np.linalg.eigvals(steps[:, 1] @ steps[:, 0])
    turning = np.abs(found.imag) > 1e-9
    bound = np.broadcast_to(np.prod(beta, axis=1)[:, None] / 4, found.shape)
    assert turning.any()
    assert (np.abs(found) <= bound + 1e-9)[turning].all()


def test_a_linear_head_counts_one_token_by_a_power() -> None:
    """S_t = beta (1 - a^t) / (1 - a) k v^T, a = decay - beta, from a state of zeros."""
    config = E88Config(
        n_heads=1, n_state=5, write_gate=True, write_gate_scale=2.0, linear_state=True
    )
    mixer = random_layer(config, 3)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 1, 16)), jnp.float32)
    x = jnp.broadcast_to(x, (4, 9, 16))
    steps = Steps.of(mixer, x)
    _, state = nnx.jit(mixer)(x)
    beta, decay = steps.write_gate[:, 0, None, None], steps.decay[:, 0, None, None]
    a, square = decay - beta, np.sum(steps.key[:, 0] ** 2, axis=1)
    assert square == pytest.approx([1] * 4, rel=1e-4)
    outer = steps.key[:, 0, :, None] * steps.value[:, 0, None, :]
    expected = beta * (1 - a**9) / (1 - a) * outer
    np.testing.assert_allclose(state.recurrent[:, 0], expected, rtol=1e-3)
