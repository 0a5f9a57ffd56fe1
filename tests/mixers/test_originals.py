"""Gated DeltaNet and Mamba2 against their originals, from state dictionaries as PyTorch has them.

Outputs, final states and gradients agree with a NumPy layer of the originals' names and layouts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.interop import mixer_from_torch, mixer_to_torch
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import GatedDeltaNetConfig, Mamba2Config
from e88_jax.mixers.gated_deltanet import GatedDeltaNetState
from e88_jax.mixers.mamba2 import Mamba2State
from e88_jax.naive import rms_ratio
from tests.recurrence_calls import QUICK_TO_COMPILE
from tests.reference import originals
from tests.reference.configs import name_of

BATCH, TIME = 2, 67
DIRECTIONS = 2
IMAGINARY_STEP = 1e-30

Config = GatedDeltaNetConfig | Mamba2Config

# Each with the width of the input; no two sizes are equal that could be taken for one another.
LAYERS: list[tuple[Config, int]] = [
    (GatedDeltaNetConfig(n_heads=3, head_dim=4, expand_v=1.5), 10),
    (GatedDeltaNetConfig(n_heads=2, n_value_heads=6, head_dim=6, expand_v=0.5, conv_size=3), 11),
    (Mamba2Config(d_state=5, head_dim=4), 10),
    (Mamba2Config(d_state=3, head_dim=3, n_groups=2, expand=1.5, conv_size=2), 12),
]
# Options have nothing to do with the dtype: others for float32.
LAYERS_IN_FLOAT32: list[tuple[Config, int]] = [
    (GatedDeltaNetConfig(n_heads=2, head_dim=5, negative_eigenvalues=True), 7),
    (GatedDeltaNetConfig(n_heads=1, n_value_heads=3, head_dim=2, expand_v=3.5, conv_size=2), 5),
    (Mamba2Config(d_state=7, head_dim=2, n_groups=3, expand=3, conv_size=5), 8),
]


def name_of_layer(layer: tuple[Config, int]) -> str:
    config, _ = layer
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    options = dataclasses.asdict(config).items()
    changed = {name: value for name, value in options if value != defaults[name]}
    return f"{config.kind}+{name_of(changed)}"


def conv_state(theirs: np.ndarray, *channels: int) -> Any:
    """`[B, size - 1, *channels]` of `[B, channels, size]`, whose oldest input no token sees."""
    recent = np.swapaxes(theirs[:, :, 1:], 1, 2)
    return recent.reshape(*recent.shape[:2], *channels)


def our_state(config: Config, theirs: Any, dtype: Any) -> Any:
    """A state of the original's layout as the mixer keeps it."""
    if isinstance(config, GatedDeltaNetConfig):
        keys = config.n_heads, config.head_dim
        state = GatedDeltaNetState(
            theirs.recurrent_state.swapaxes(2, 3),
            conv_state(theirs.q_conv_state, *keys),
            conv_state(theirs.k_conv_state, *keys),
            conv_state(theirs.v_conv_state, config.value_heads, config.value_dim),
        )
    else:
        groups = config.n_groups, config.d_state
        n_groups = config.n_groups * config.d_state
        x, b, c = np.split(theirs.conv_state, [-2 * n_groups, -n_groups], axis=1)
        state = Mamba2State(
            theirs.ssm_state.swapaxes(2, 3),
            conv_state(x, -1, config.head_dim),
            conv_state(b, *groups),
            conv_state(c, *groups),
        )
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), state)


def their_state(config: Config, ours: Any) -> dict[str, np.ndarray]:
    """A state of the mixer's, or its gradient, in the original's layout; zeros for the oldest
    inputs of convolutions, which the mixer does not keep."""

    def conv(*parts: Any) -> np.ndarray:
        rows = np.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], axis=2)
        return np.pad(np.swapaxes(rows, 1, 2), ((0, 0), (0, 0), (1, 0)))

    recurrent = np.swapaxes(ours.recurrent, 2, 3)
    if isinstance(config, Mamba2Config):
        past = conv(ours.x_conv, ours.b_conv, ours.c_conv)
        return {"ssm_state": recurrent, "conv_state": past}
    convs = {f"{name}_conv_state": conv(getattr(ours, f"{name}_conv")) for name in "qkv"}
    return {"recurrent_state": recurrent} | convs


def original(config: Config, weights: Any, x: Any, state: Any) -> Any:
    if isinstance(config, GatedDeltaNetConfig):
        return originals.gated_deltanet(config, weights, x, state)
    return originals.mamba2(config, weights, x, state)


def check_parity(layer: tuple[Config, int], execution: Execution, bound: float) -> None:
    """Outputs, states and gradients of a layer after a state of another call's."""
    config, dim = layer
    dtype = jnp.dtype(execution.dtype)
    rng = np.random.default_rng(0)
    weights = originals.random_weights(config, dim)
    x, d_y = rng.normal(size=(2, BATCH, TIME, dim)).astype(dtype).astype(np.float64)
    state, d_state = (
        jax.tree.map(
            lambda x: x.astype(dtype).astype(np.float64),
            originals.random_state(config, dim, BATCH, seed),
        )
        for seed in (0, 1)
    )
    # The originals keep one input more than a token sees.
    d_state = type(d_state)(
        *(
            d * (np.arange(d.shape[-1]) > 0) if "conv" in name else d
            for name, d in d_state._asdict().items()
        )
    )

    graphdef, params = nnx.split(mixer_from_torch(weights, config, dim, execution))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    cotangents = jnp.asarray(d_y, dtype), our_state(config, d_state, dtype)

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def evaluate(*arguments: Any) -> Any:
        def f(params: Any, x: Any, state: Any) -> Any:
            return nnx.merge(graphdef, params)(x, state)

        results, pullback = jax.vjp(f, *arguments)
        return results, pullback(cotangents)

    results, (d_params, d_x, d_before) = evaluate(
        params, jnp.asarray(x, dtype), our_state(config, state, dtype)
    )
    weights = {key: w.astype(np.float64) for key, w in weights.items()}
    y, after = original(config, weights, x, state)
    expected = y, our_state(config, after, dtype)
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert got.dtype == dtype
        assert got.shape == wanted.shape
        assert rms_ratio(got, wanted) < bound

    def loss(weights: Any, x: Any, state: Any) -> Any:
        results = original(config, weights, x, state)
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves((d_y, d_state)), strict=True)
        return sum(np.sum(a * b) for a, b in pairs)

    def check(name: str, gradient: Any, slope: Any) -> None:
        """The gradient by its slopes along random directions of -1 and 1, along which the mean
        square of an error is its squared norm."""
        gradient = np.asarray(gradient, np.float64)
        norm = np.linalg.norm(gradient)
        assert norm > 1e-3, name
        errors = list[float]()
        for _ in range(DIRECTIONS):
            direction = rng.choice([-1.0, 1.0], gradient.shape)
            step = IMAGINARY_STEP * 1j * direction
            measured = np.imag(slope(step)) / IMAGINARY_STEP
            errors.append(measured - np.sum(gradient * direction))
        assert np.sqrt(np.mean(np.square(errors))) < bound * norm, name

    gradients = mixer_to_torch(nnx.merge(graphdef, d_params))
    assert gradients.keys() == weights.keys()
    for key, gradient in gradients.items():
        assert gradient.dtype == dtype
        check(key, gradient, lambda d, key=key: loss(weights | {key: weights[key] + d}, x, state))
    check("x", d_x, lambda d: loss(weights, x + d, state))
    for name, gradient in their_state(config, d_before).items():
        moved = lambda d, name=name: state._replace(**{name: getattr(state, name) + d})  # noqa: E731
        check(name, gradient, lambda d, moved=moved: loss(weights, x, moved(d)))


@pytest.mark.parametrize("layer", LAYERS, ids=name_of_layer)
def test_parity_in_float64(layer: tuple[Config, int], float64: None) -> None:
    check_parity(layer, Execution(dtype="float64"), 1e-10)


@pytest.mark.parametrize("layer", LAYERS_IN_FLOAT32, ids=name_of_layer)
def test_parity_in_float32(layer: tuple[Config, int]) -> None:
    check_parity(layer, Execution(dtype="float32"), 1e-5)
