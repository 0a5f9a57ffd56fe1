"""Softmax attention as float64 NumPy: RoPE, QK norm, grouped heads, window and documents.

Written from the definition, one query at a time, and sharing nothing with `e88_jax` but the
configuration.
"""

import numpy as np

from e88_jax.mixers.baselines import AttentionConfig

Weights = dict[str, np.ndarray]


def shapes(config: AttentionConfig, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's parameters, by path."""
    H, G, D = config.n_heads, config.n_kv_heads or config.n_heads, config.head_dim
    kernels = {"q": (dim, H, D), "k": (dim, G, D), "v": (dim, G, D), "output": (H, D, dim)}
    norms = {"q_norm.scale": (D,), "k_norm.scale": (D,)} if config.qk_norm else {}
    return {f"{name}.kernel": shape for name, shape in kernels.items()} | norms


def positions_of(ids: np.ndarray) -> np.ndarray:
    """Position of each token in its document, of ids `[T]`."""
    positions = np.zeros(len(ids), int)
    for t in range(1, len(ids)):
        positions[t] = positions[t - 1] + 1 if ids[t] == ids[t - 1] else 0
    return positions


def keys_and_values(
    config: AttentionConfig, weights: Weights, x: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys after norm and RoPE, and values, `[T, G, D]`, of x `[T, dim]`."""
    keys = np.einsum("td,dgk->tgk", x, weights["k.kernel"])
    values = np.einsum("td,dgk->tgk", x, weights["v.kernel"])
    return _prepared(config, keys, weights.get("k_norm.scale"), positions), values


def attention(
    config: AttentionConfig,
    weights: Weights,
    x: np.ndarray,
    ids: np.ndarray,
    reach: int | None = None,
) -> np.ndarray:
    """The layer's outputs `[T, dim]`.

    Args:
        config: sizes and options.
        weights: as `shapes` lists them.
        x: `[T, dim]`.
        ids: of documents, `[T]`.
        reach: tokens that a token sees, itself among them; None for the configuration's window.
    """
    positions = positions_of(ids)
    queries = np.einsum("td,dhk->thk", x, weights["q.kernel"])
    queries = _prepared(config, queries, weights.get("q_norm.scale"), positions)
    keys, values = keys_and_values(config, weights, x, positions)
    reach = reach or config.window or len(x)
    y = np.zeros_like(x)
    for t in range(len(x)):
        first = t - min(positions[t], reach - 1)
        for h in range(config.n_heads):
            g = h * keys.shape[1] // config.n_heads
            scores = keys[first : t + 1, g] @ queries[t, h] / np.sqrt(config.head_dim)
            weight = np.exp(scores - scores.max())
            out = weight @ values[first : t + 1, g] / weight.sum()
            y[t] += out @ weights["output.kernel"][h]
    return y


def _prepared(
    config: AttentionConfig, y: np.ndarray, scale: np.ndarray | None, positions: np.ndarray
) -> np.ndarray:
    """Queries or keys `[T, heads, D]` after norm and RoPE, which turns complex numbers."""
    if scale is not None:
        y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-5) * scale
    half = config.head_dim // 2
    rates = config.rope_base ** (-2 * np.arange(half) / config.head_dim)
    turned = (y[..., :half] + 1j * y[..., half:]) * np.exp(
        1j * positions[:, None, None] * rates[None, None, :]
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)
