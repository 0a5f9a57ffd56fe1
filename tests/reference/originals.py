"""The original Gated DeltaNet and Mamba2 layers as NumPy, from their PyTorch state dictionaries.

Written from the layers' definitions (Gated DeltaNet and flash-linear-attention, Mamba2 and Mamba:
`docs/references.md`), step by step, and sharing nothing with `e88_jax` but the configurations. No
operation leaves the complex numbers or takes a conjugate, so that a step along the imaginary axis
gives slopes to the last digits of float64.
"""

from typing import NamedTuple

import numpy as np

from e88_jax.config import E88Config
from e88_jax.mixers.base import MixerConfig
from e88_jax.mixers.baselines import GatedDeltaNetConfig, Mamba2Config
from tests.reference import layer as e88_layer

Weights = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class GatedDeltaNetState(NamedTuple):
    """The cache of `fla.layers.GatedDeltaNet`."""

    recurrent_state: np.ndarray
    """[B, HV, V, K]"""
    q_conv_state: np.ndarray
    """The last inputs of the convolution, the newest last: [B, channels, size]."""
    k_conv_state: np.ndarray
    v_conv_state: np.ndarray


class Mamba2State(NamedTuple):
    """The inference cache of `mamba_ssm.Mamba2`."""

    ssm_state: np.ndarray
    """[B, H, P, N]"""
    conv_state: np.ndarray
    """The last inputs of the convolution on x, B and C, the newest last: [B, channels, size]."""


def torch_shapes(config: MixerConfig, dim: int) -> Shapes:
    """The keys and shapes of the original layer's state dictionary."""
    match config:
        case E88Config():
            return e88_layer.torch_shapes(config, dim)
        case GatedDeltaNetConfig():
            return gated_deltanet_shapes(config, dim)
        case Mamba2Config():
            return mamba2_shapes(config, dim)
        case _:
            raise TypeError(type(config))


def gated_deltanet_shapes(config: GatedDeltaNetConfig, dim: int) -> Shapes:
    heads, n_value = config.n_value_heads or config.n_heads, int(config.expand_v * config.head_dim)
    keys, values = config.n_heads * config.head_dim, heads * n_value
    return {
        "A_log": (heads,),
        "dt_bias": (heads,),
        "q_proj.weight": (keys, dim),
        "k_proj.weight": (keys, dim),
        "v_proj.weight": (values, dim),
        "a_proj.weight": (heads, dim),
        "b_proj.weight": (heads, dim),
        "q_conv1d.weight": (keys, 1, config.conv_size),
        "k_conv1d.weight": (keys, 1, config.conv_size),
        "v_conv1d.weight": (values, 1, config.conv_size),
        "g_proj.weight": (values, dim),
        "o_norm.weight": (n_value,),
        "o_proj.weight": (dim, values),
    }


def mamba2_shapes(config: Mamba2Config, dim: int) -> Shapes:
    inner = int(config.expand * dim)
    heads, channels = inner // config.head_dim, inner + 2 * config.n_groups * config.d_state
    return {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "in_proj.weight": (inner + channels + heads, dim),
        "conv1d.weight": (channels, 1, config.conv_size),
        "conv1d.bias": (channels,),
        "norm.weight": (inner,),
        "out_proj.weight": (dim, inner),
    }


def random_weights(config: MixerConfig, dim: int, seed: int = 0) -> Weights:
    """float32 numbers, none at the value it is initialised with."""
    if isinstance(config, E88Config):
        return e88_layer.random_weights(config, dim, seed)
    rng = np.random.default_rng(seed)

    def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
        match key:
            case "A_log" | "D" | "o_norm.weight" | "norm.weight":
                x = rng.uniform(0.3, 1.2, shape)
            case "dt_bias":
                x = rng.uniform(-3, -1, shape)
            case _:
                x = rng.normal(size=shape) / np.sqrt(shape[-1])
        return x.astype(np.float32)

    return {key: draw(key, shape) for key, shape in torch_shapes(config, dim).items()}


def random_state(
    config: GatedDeltaNetConfig | Mamba2Config, dim: int, batch: int, seed: int = 0
) -> GatedDeltaNetState | Mamba2State:
    rng = np.random.default_rng([seed, batch])
    shapes = torch_shapes(config, dim)
    (heads,) = shapes["A_log"]

    def past(key: str) -> np.ndarray:
        channels, _, size = shapes[key]
        return rng.normal(size=(batch, channels, size))

    if isinstance(config, Mamba2Config):
        matrix = config.head_dim, config.d_state
        recurrent = rng.uniform(-0.6, 0.6, (batch, heads, *matrix))
        return Mamba2State(recurrent, past("conv1d.weight"))
    matrix = *shapes["o_norm.weight"], config.head_dim
    recurrent = rng.uniform(-0.6, 0.6, (batch, heads, *matrix))
    return GatedDeltaNetState(recurrent, *(past(f"{x}_conv1d.weight") for x in "qkv"))


def gated_deltanet(
    config: GatedDeltaNetConfig, weights: Weights, x: np.ndarray, state: GatedDeltaNetState
) -> tuple[np.ndarray, GatedDeltaNetState]:
    """Outputs `[B, T, dim]` of x `[B, T, dim]`, and the state after the last token."""
    n_key = config.head_dim
    (n_value,), (heads,) = weights["o_norm.weight"].shape, weights["A_log"].shape

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}_proj.weight"].T

    def convolved(name: str, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, past = causal_conv1d(linear(name, x), weights[f"{name}_conv1d.weight"], past)
        return silu(y), past

    q, q_past = convolved("q", state.q_conv_state)
    k, k_past = convolved("k", state.k_conv_state)
    v, v_past = convolved("v", state.v_conv_state)
    q, k = (unit_length(by_head(z, n_key)) for z in (q, k))
    v = by_head(v, n_value)
    # A head of q and k serves the heads of v that follow one another.
    q, k = (np.repeat(z, heads // config.n_heads, axis=2) for z in (q, k))
    beta = sigmoid(linear("b", x)) * (2 if config.negative_eigenvalues else 1)
    alpha = np.exp(-np.exp(weights["A_log"]) * softplus(linear("a", x) + weights["dt_bias"]))

    S, rows = np.swapaxes(state.recurrent_state, 2, 3), list[np.ndarray]()  # S: [B, HV, K, V]
    eye = np.eye(n_key)
    for t in range(x.shape[1]):
        a, b = alpha[:, t, :, None, None], beta[:, t, :, None, None]
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        S = a * ((eye - b * key * np.swapaxes(key, 2, 3)) @ S) + b * key * value
        rows.append(np.einsum("bhkv,bhk->bhv", S, q[:, t]) / np.sqrt(n_key))
    out = rms_norm(np.stack(rows, axis=1)) * weights["o_norm.weight"]
    out = out * silu(by_head(linear("g", x), n_value))
    y = linear("o", out.reshape(*x.shape[:2], -1))
    return y, GatedDeltaNetState(np.swapaxes(S, 2, 3), q_past, k_past, v_past)


def mamba2(
    config: Mamba2Config, weights: Weights, u: np.ndarray, state: Mamba2State
) -> tuple[np.ndarray, Mamba2State]:
    """Outputs `[B, T, dim]` of u `[B, T, dim]`, and the state after the last token."""
    groups, n_state = config.n_groups, config.d_state
    (inner,), (heads,) = weights["norm.weight"].shape, weights["A_log"].shape
    columns = u @ weights["in_proj.weight"].T
    z, xbc, dt = np.split(columns, [inner, columns.shape[-1] - heads], axis=-1)
    xbc, past = causal_conv1d(xbc, weights["conv1d.weight"], state.conv_state)
    xbc = silu(xbc + weights["conv1d.bias"])
    x, b, c = np.split(xbc, [inner, inner + groups * n_state], axis=-1)
    x = by_head(x, config.head_dim)
    # A group's B and C serve the heads that follow one another.
    b, c = (np.repeat(by_head(z, n_state), heads // groups, axis=2) for z in (b, c))
    dt = softplus(dt + weights["dt_bias"])
    decay = np.exp(-np.exp(weights["A_log"]) * dt)

    S, rows = state.ssm_state, list[np.ndarray]()
    for t in range(u.shape[1]):
        write = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None, :]
        S = decay[:, t, :, None, None] * S + write
        rows.append(np.einsum("bhpn,bhn->bhp", S, c[:, t]) + weights["D"][:, None] * x[:, t])
    out = np.stack(rows, axis=1).reshape(z.shape) * silu(z)
    out = rms_norm(by_head(out, inner // groups)).reshape(z.shape) * weights["norm.weight"]
    return out @ weights["out_proj.weight"].T, Mamba2State(S, past)


def causal_conv1d(
    x: np.ndarray, weight: np.ndarray, past: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's Conv1d, depthwise, of x `[B, T, channels]` after its past `[B, channels, size]`."""
    rows = list[np.ndarray]()
    for t in range(x.shape[1]):
        past = np.concatenate([past[:, :, 1:], x[:, t, :, None]], axis=2)
        rows.append(np.sum(past * weight[:, 0], axis=-1))
    return np.stack(rows, axis=1), past


def by_head(x: np.ndarray, size: int) -> np.ndarray:
    """`[B, T, heads, size]` of `[B, T, heads * size]`."""
    return x.reshape(*x.shape[:2], -1, size)


def unit_length(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))
