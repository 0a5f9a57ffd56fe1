"""The whole E88 layer as float64 NumPy, from weights as the original PyTorch layer keeps them.

Written from the description of the layer, with loops where they are clearest, and sharing nothing
with `e88_jax` but the configuration and the recurrence of `e88_jax.naive`.
"""

from typing import NamedTuple

import numpy as np

from e88_jax import naive
from e88_jax.config import E88Config

Weights = dict[str, np.ndarray]


class State(NamedTuple):
    recurrent: np.ndarray
    """[B, H, N, V]"""
    conv: dict[str, np.ndarray]
    """The last size - 1 inputs of the convolutions on q, k, v: [B, size - 1, channels]."""


def torch_shapes(config: E88Config, dim: int) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the original layer's state dictionary."""
    H, V = config.n_heads, config.n_value
    keys, values = H * config.n_state, H * V
    shapes: dict[str, tuple[int, ...]] = {}
    if config.tie_kv:
        shapes |= {"q_proj.weight": (keys, dim), "k_proj.weight": (keys, dim)}
    else:
        shapes |= {"qkv_proj.weight": (2 * keys + values, dim)}
    if config.conv_size is not None:
        for name, channels in conv_channels(config).items():
            shapes[f"{name}_conv.weight"] = (channels, 1, config.conv_size)
    match config.decay_mode:
        case "mamba":
            shapes |= {"a_proj.weight": (H, dim), "A_log": (H,), "dt_bias": (H,)}
        case "simple":
            shapes |= {"beta_proj.weight": (H, dim)}
        case "constant":
            shapes |= {"decay_logit": (H,)}
    if config.write_gate:
        shapes |= {"write_gate_proj.weight": (H, dim)}
    if config.value_residual:
        shapes |= {"value_residual": (H, V)}
    if config.output_norm:
        shapes |= {"o_norm_weight": (V,)}
    if config.output_gate != "none":
        shapes |= {"g_proj.weight": (values, dim)}
    match config.head_mix:
        case "concat":
            shapes |= {"o_proj.weight": (dim, values)}
        case "weighted_sum":
            shapes |= {"head_weights": (H,), "o_proj.weight": (dim, V)}
        case "per_head":
            shapes |= {f"head_projs.{i}.weight": (dim, V) for i in range(H)}
        case "input_weighted":
            shapes |= {"head_attn.weight": (H, dim), "o_proj.weight": (dim, V)}
        case "sum":
            shapes |= {"o_proj.weight": (dim, V)}
    return shapes


def conv_channels(config: E88Config) -> dict[str, int]:
    keys = config.n_heads * config.n_state
    channels = {"q": keys, "k": keys}
    return channels if config.tie_kv else channels | {"v": config.n_heads * config.n_value}


def random_weights(config: E88Config, dim: int, seed: int = 0) -> Weights:
    """float32 numbers, none at the value it is initialised with."""
    rng = np.random.default_rng(seed)

    def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
        match key:
            case "A_log" | "o_norm_weight" | "value_residual" | "head_weights":
                x = rng.uniform(0.3, 1.2, shape)
            case "dt_bias":
                x = rng.uniform(-3, -1, shape)
            case "decay_logit":
                x = rng.uniform(1, 3, shape)
            case _:
                x = rng.normal(size=shape) / np.sqrt(shape[-1])
        return x.astype(np.float32)

    return {key: draw(key, shape) for key, shape in torch_shapes(config, dim).items()}


def join_heads(config: E88Config, streams: dict[str, np.ndarray]) -> np.ndarray | None:
    """Arrays `[..., H * N]` of q, k and v as the layer keeps them, `[..., H, 2N + V]`."""
    heads = [x.reshape(*x.shape[:-1], config.n_heads, -1) for x in streams.values()]
    return np.concatenate(heads, axis=-1) if heads else None


def split_heads(config: E88Config, joined: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `join_heads`."""
    n_state = config.n_state
    parts = np.split(joined, [n_state, 2 * n_state], axis=-1)
    names = conv_channels(config)
    return {
        name: part.reshape(*joined.shape[:-2], -1)
        for name, part in zip(names, parts[: len(names)], strict=True)
    }


def random_state(config: E88Config, batch: int, seed: int = 0) -> State:
    rng = np.random.default_rng([seed, batch])
    shape = (batch, config.n_heads, config.n_state, config.n_value)
    conv: dict[str, np.ndarray] = {}
    if config.conv_size is not None:
        for name, channels in conv_channels(config).items():
            conv[name] = rng.normal(size=(batch, config.conv_size - 1, channels))
    return State(rng.uniform(-0.6, 0.6, shape), conv)


def layer(
    config: E88Config,
    weights: Weights,
    x: np.ndarray,
    state: State,
    segment_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, State]:
    batch, time, _ = x.shape
    H, N, V = config.n_heads, config.n_state, config.n_value

    def project(key: str) -> np.ndarray:
        return np.einsum("btd,od->bto", x, weights[key].astype(np.float64))

    if config.tie_kv:
        streams = {"q": project("q_proj.weight"), "k": project("k_proj.weight")}
    else:
        rows = project("qkv_proj.weight")
        streams = {
            "q": rows[..., : H * N],
            "k": rows[..., H * N : 2 * H * N],
            "v": rows[..., 2 * H * N :],
        }
    new_conv = {}
    if config.conv_size is not None:
        for name, stream in streams.items():
            streams[name], new_conv[name] = short_conv(
                weights[f"{name}_conv.weight"], stream, state.conv[name], segment_ids
            )
    if config.use_silu:
        streams = {name: silu(stream) for name, stream in streams.items()}
    q = streams["q"].reshape(batch, time, H, N)
    k = streams["k"].reshape(batch, time, H, N)
    v = k if config.tie_kv else streams["v"].reshape(batch, time, H, V)
    if config.use_l2_norm:
        q = q / (np.sqrt(np.sum(q**2, axis=-1, keepdims=True)) + 1e-6)
        k = k / (np.sqrt(np.sum(k**2, axis=-1, keepdims=True)) + 1e-6)

    match config.decay_mode:
        case "mamba":
            dt = np.log1p(np.exp(project("a_proj.weight") + weights["dt_bias"]))
            decay = np.exp(-np.exp(weights["A_log"].astype(np.float64)) * dt)
        case "simple":
            decay = sigmoid(project("beta_proj.weight"))
        case "constant":
            decay = np.ones((batch, time, 1)) * sigmoid(weights["decay_logit"].astype(np.float64))
        case "none":
            decay = np.ones((batch, time, H))
    run = naive.run(
        naive.Inputs(
            q,
            k,
            v,
            decay,
            write_gate=(
                config.write_gate_scale * sigmoid(project("write_gate_proj.weight"))
                if config.write_gate
                else None
            ),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            linear_state=config.linear_state,
        )
    )
    out = run.out
    if config.value_residual:
        out = out + weights["value_residual"] * v
    if config.output_norm:
        out = rms_norm(out, weights["o_norm_weight"])
    if config.output_gate != "none":
        gate = project("g_proj.weight").reshape(batch, time, H, V)
        out = out * (silu(gate) if config.output_gate == "silu" else sigmoid(gate))

    match config.head_mix:
        case "concat":
            mixed = out.reshape(batch, time, H * V)
        case "per_head":
            y = sum(out[:, :, h] @ weights[f"head_projs.{h}.weight"].T for h in range(H))
            return np.asarray(y), State(run.final_state, new_conv)
        case "weighted_sum":
            shares = softmax(weights["head_weights"].astype(np.float64))
            mixed = sum(shares[h] * out[:, :, h] for h in range(H))
        case "input_weighted":
            shares = softmax(project("head_attn.weight"))
            mixed = sum(shares[:, :, h, None] * out[:, :, h] for h in range(H))
        case "sum":
            mixed = sum(out[:, :, h] for h in range(H))
    y = np.asarray(mixed) @ weights["o_proj.weight"].astype(np.float64).T
    return y, State(run.final_state, new_conv)


def short_conv(
    weight: np.ndarray, x: np.ndarray, past: np.ndarray, segment_ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What PyTorch's Conv1d does to the past followed by x, within each document."""
    batch, time, channels = x.shape
    size = weight.shape[-1]
    y = np.zeros((batch, time, channels))
    state = np.zeros((batch, size - 1, channels))
    for b in range(batch):
        window = [past[b, i] for i in range(size - 1)]  # the newest last
        for t in range(time):
            if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
                window = [np.zeros(channels)] * (size - 1)
            window.append(x[b, t])
            y[b, t] = sum(weight[:, 0, i] * window[i] for i in range(size))
            window = window[1:]
        state[b] = np.array(window)
    return y, state


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)
