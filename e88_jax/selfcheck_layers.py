"""Cases of `selfcheck` for a layer's other kernels, against float64.

They are what a GPU runs between a layer's two matmuls: SiLU and unit length of q, k and v with
their gradient, and for a single token all of it.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from e88_jax import kernels, naive, token_kernel
from e88_jax.activation import LENGTH_EPSILON
from e88_jax.config import E88Config
from e88_jax.typed import jit, vjp

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One call of a layer's kernel."""

    kernel: Literal["activation", "decode"]
    shape: tuple[int, int, int, int, int]
    """B, T, H, N, V; T is 1 to decode."""
    dtype: str
    """Compute dtype."""
    write_gate: bool = False
    """Whether there is one; to decode only."""
    extreme: None = None

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{n}" for letter, n in zip("BTHNV", self.shape, strict=True))
        return f"{sizes:20} {self.dtype:8} {self.kernel}{', gate' if self.write_gate else ''}"

    @property
    def config(self) -> E88Config:
        """The layer."""
        _, _, heads, n_state, n_value = self.shape
        return E88Config(n_heads=heads, n_state=n_state, expansion=n_value / n_state)


DTYPES = "float32", "bfloat16"
FULL = tuple(
    LayerCase(*case)  # pyright: ignore[reportArgumentType]
    for dtype in DTYPES
    for case in (
        ("activation", (3, 75, 5, 64, 32), dtype),
        ("activation", (2, 100, 7, 128, 24), dtype),
        ("activation", (4, 33, 72, 32, 32), dtype),
        ("decode", (3, 1, 72, 32, 32), dtype),
        ("decode", (1, 1, 3, 128, 128), dtype),
        ("decode", (40, 1, 5, 72, 36), dtype, True),
    )
)
QUICK = tuple(case for case in FULL if case.shape[2] == 72 and case.dtype == "bfloat16")


def make_inputs(case: LayerCase) -> Arrays:
    """Random inputs in float64, after rounding to the dtype in which they are given; `d_x` are
    cotangents."""
    batch, time, heads, n_state, n_value = case.shape
    rng = np.random.default_rng(case.shape)
    config, per_head = case.config, (batch, time, heads)
    columns = heads * config.head_columns
    narrow = {"y": 2 * rng.normal(size=(batch, time, columns))}
    wide: Arrays = {}
    if case.kernel == "activation":
        sizes = {"d_q": n_state, "d_k": n_state, "d_v": n_value}
        narrow |= {name: rng.normal(size=(*per_head, n)) for name, n in sizes.items()}
    else:
        narrow["y"] = 2 * rng.normal(size=(batch, time, columns + heads * n_value))
        wide = {
            "decay": rng.uniform(0.5, 1.0, per_head),
            "state": rng.uniform(-0.6, 0.6, (batch, heads, n_state, n_value)),
        }
        if case.write_gate:
            wide["write_gate"] = rng.uniform(0.3, 1.0, per_head)
    rounded = {name: jnp.asarray(x, case.dtype) for name, x in narrow.items()}
    rounded |= {name: jnp.asarray(x, "float32") for name, x in wide.items()}
    return {name: np.asarray(x).astype(np.float64) for name, x in rounded.items()}


def reference(inputs: Arrays, case: LayerCase) -> Arrays:
    """Results, and the gradient of `y` where there is one."""
    config, y = case.config, inputs["y"]
    _, _, heads, n_state, _ = case.shape
    columns = heads * config.head_columns
    streams = y[..., :columns].reshape(*y.shape[:2], heads, config.head_columns)
    parts = np.split(streams, [n_state, 2 * n_state], axis=-1)
    q, k, v = (_activated(x, unit) for x, unit in zip(parts, _UNIT_LENGTH, strict=True))
    if case.kernel == "activation":
        cotangents = (inputs[name] for name in ("d_q", "d_k", "d_v"))
        gradients = map(_gradient, parts, _UNIT_LENGTH, cotangents)
        d_y = np.concatenate(list(gradients), axis=-1).reshape(y.shape)
        return {"q": q, "k": k, "v": v, "d_y": d_y}
    gate = y[..., columns:].reshape(v.shape)
    result = naive.run(
        naive.Inputs(q, k, v, inputs["decay"], inputs.get("write_gate"), inputs["state"])
    )
    return {"out": result.out * _silu(gate), "state": result.final_state}


_UNIT_LENGTH = True, True, False
"""Whether q, k and v get unit length."""


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _length(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


def _activated(x: np.ndarray, unit: bool) -> np.ndarray:
    z = _silu(x)
    return z / (_length(z) + LENGTH_EPSILON) if unit else z


def _gradient(x: np.ndarray, unit: bool, d: np.ndarray) -> np.ndarray:
    if unit:
        z = _silu(x)
        length = _length(z)
        divisor = length + LENGTH_EPSILON
        along = np.sum(z * d, axis=-1, keepdims=True) / (length * divisor**2)
        d = d / divisor - z * along
    sigmoid = _sigmoid(x)
    return d * (sigmoid + x * sigmoid * (1 - sigmoid))


def evaluate(inputs: Arrays, case: LayerCase) -> Arrays:
    """What the kernel computes, under the names of `reference`.

    Raises:
        NotImplementedError: it does not run here, or does not take the sizes.
    """
    kernels.require("mosaic_gpu")
    wide = "decay", "write_gate", "state"
    arrays = {x: jnp.asarray(inputs[x], "float32" if x in wide else case.dtype) for x in inputs}
    of_kernel = {"activation": _activate, "decode": _decode}[case.kernel]

    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return of_kernel(case.config, **arrays)

    results = jit(run)(arrays)
    return {name: np.asarray(x) for name, x in results.items()}


def _activate(config: E88Config, y: jax.Array, **cotangents: jax.Array) -> dict[str, jax.Array]:
    from pallas_kernels.qkv_activation import activate

    def by_kernel(y: jax.Array) -> Any:
        return kernels.call(activate, kernels.head_columns(config), y, 0)

    (q, k, v, rest), pullback = vjp(by_kernel, y)
    d = (*(cotangents[name] for name in ("d_q", "d_k", "d_v")), jnp.zeros_like(rest))
    return {"q": q, "k": k, "v": v, "d_y": pullback(d)[0]}


def _decode(
    config: E88Config,
    y: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    write_gate: jax.Array | None = None,
) -> dict[str, jax.Array]:
    gate_start = config.n_heads * config.head_columns
    out, state = token_kernel.decode(config, y, gate_start, decay, write_gate, state)
    return {"out": out, "state": state}
