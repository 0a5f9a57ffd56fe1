"""Results of the kernels of qkv_activation and decode, by XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e88_jax.activation import activate
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.qkv_activation import HeadColumns
from pallas_kernels.recurrence import single_step

OPTIONS: list[dict[str, Any]] = [
    {"gate": "sigmoid"},
    {"gate": "none"},
    {"silu": False},
    {"unit_length": False},
    {"linear_state": True},
    {"n_between": 3},
]
"""Options of `a_layer`."""


def a_layer(
    heads: int,
    n_state: int,
    n_value: int,
    *,
    n_between: int = 0,
    gate: Any = "silu",
    **options: Any,
) -> DecodeConfig:
    """A layer whose gate starts `n_between` columns after v."""
    options = {"silu": True, "unit_length": True, "linear_state": False, **options}
    linear_state = options.pop("linear_state")
    columns = HeadColumns(heads, n_state, n_value, **options)
    return DecodeConfig(columns, gate, columns.n_columns + n_between, linear_state)


def activated(columns: HeadColumns, n_rest: int, x: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and the rest of a matmul's output `[..., columns]`: what `activate` computes."""
    heads, rest = jnp.split(x, [columns.n_columns], axis=-1)
    rest = rest[..., :n_rest]
    heads = heads.reshape(*x.shape[:-1], columns.n_heads, columns.of_head)
    q, k, v = jnp.split(heads, [columns.n_state, 2 * columns.n_state], axis=-1)
    unit = columns.unit_length
    return (
        activate(q, columns.silu, unit),
        activate(k, columns.silu, unit),
        activate(v, columns.silu, False),
        rest,
    )


def decoded(
    layer: DecodeConfig,
    x: jax.Array,
    decay: jax.Array,
    write_gate: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Results of `decode_layer`."""
    q, k, v, _ = activated(layer.columns, 0, x[:, None])
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


def inputs(layer: DecodeConfig, rows: int, dtype: Any, has_write_gate: bool) -> dict[str, Any]:
    columns = layer.columns
    rng = np.random.default_rng([columns.n_heads, columns.n_state, columns.n_value])
    n_columns = layer.gate_start + columns.n_heads * columns.n_value
    x = (2 * rng.normal(size=(rows, n_columns))).astype(dtype)
    x[:, : columns.n_state] = 0  # a head of zeros
    shape = (rows, columns.n_heads)
    arrays = {"x": x, "decay": rng.uniform(0.5, 1, shape).astype(np.float32)}
    if has_write_gate:
        arrays["write_gate"] = rng.uniform(size=shape).astype(np.float32)
    state = rng.uniform(-1, 1, (*shape, columns.n_state, columns.n_value))
    return {**arrays, "state": state.astype(np.float32)}
