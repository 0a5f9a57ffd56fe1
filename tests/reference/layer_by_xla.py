"""What a layer does between its matrix products, by XLA: for the tests of kernels that do it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e88_jax.activation import activate
from pallas_kernels import single_step
from pallas_kernels.activation import Split
from pallas_kernels.decode_layer import Layer

OPTIONS: list[dict[str, Any]] = [
    {"gate": "sigmoid"},
    {"gate": "none"},
    {"silu": False},
    {"unit_length": False},
    {"linear_state": True},
    {"n_between": 3},
]
"""Of `a_layer`."""


def a_layer(
    heads: int,
    n_state: int,
    n_value: int,
    *,
    n_between: int = 0,
    gate: Any = "silu",
    **options: Any,
) -> Layer:
    """Its gate comes `n_between` columns after v."""
    options = {"silu": True, "unit_length": True, "linear_state": False, **options}
    linear_state = options.pop("linear_state")
    split = Split(heads, n_state, n_value, **options)
    return Layer(split, gate, split.columns + n_between, linear_state)


def activated(split: Split, x: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and the rest of a product `[..., columns]`."""
    keys = split.heads * split.n_state
    q, k, v, rest = jnp.split(x, [keys, 2 * keys, split.columns], axis=-1)
    q, k, v = (y.reshape(*x.shape[:-1], split.heads, -1) for y in (q, k, v))
    unit = split.unit_length
    return (
        activate(q, split.silu, unit),
        activate(k, split.silu, unit),
        activate(v, split.silu, False),
        rest,
    )


def decoded(
    layer: Layer, x: jax.Array, decay: jax.Array, write_gate: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `decode_layer` computes."""
    q, k, v, _ = activated(layer.split, x[:, None])
    out, state = single_step(
        q,
        k,
        v,
        decay[:, None],
        None if write_gate is None else write_gate[:, None],
        state,
        linear_state=layer.linear_state,
    )
    out = out.reshape(len(x), -1)
    if layer.gate != "none":
        gate = x[:, layer.gate_start : layer.gate_start + out.shape[1]]
        out *= jax.nn.silu(gate) if layer.gate == "silu" else jax.nn.sigmoid(gate)
    return out, state


def inputs(layer: Layer, rows: int, dtype: Any, has_write_gate: bool) -> dict[str, np.ndarray]:
    split = layer.split
    rng = np.random.default_rng([split.heads, split.n_state, split.n_value])
    columns = layer.gate_start + split.heads * split.n_value
    x = (2 * rng.normal(size=(rows, columns))).astype(dtype)
    x[:, : split.n_state] = 0  # a head of zeros
    shape = (rows, split.heads)
    arrays = {"x": x, "decay": rng.uniform(0.5, 1, shape).astype(np.float32)}
    if has_write_gate:
        arrays["write_gate"] = rng.uniform(size=shape).astype(np.float32)
    state = rng.uniform(-1, 1, (*shape, split.n_state, split.n_value))
    return {**arrays, "state": state.astype(np.float32)}
