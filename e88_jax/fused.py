"""What a layer computes between its matrix products by one kernel, where there is one.

Each function gives None where there is none: for this device, this version of JAX, these sizes or
options, or for `implementation="scan"`. Then XLA computes the same.
"""

from typing import Any

from jax import Array

from e88_jax import kernels, recurrence
from e88_jax.config import E88Config


def activate_product(config: E88Config, y: Array) -> tuple[Array, Array, Array, Array] | None:
    """`qkv_activation.activate` for q, k and v side by side.

    Args:
        y: `[B, T, columns]`: q and k of all heads, v of all, and whatever else.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]` and the columns after theirs, in y's dtype.
    """
    if config.tie_kv or config.conv_size or not recurrence.kernels_run(config.implementation):
        return None
    if refusal := kernels.import_refusal():
        return _left_to_xla("SiLU and unit length", refusal)
    from pallas_kernels import qkv_activation

    columns = _columns(config)
    if refusal := kernels.lowering_refusal(qkv_activation.activate, columns, y):
        return _left_to_xla("SiLU and unit length", refusal)
    try:
        return qkv_activation.activate(columns, y)
    except NotImplementedError as refusal:
        return _left_to_xla("SiLU and unit length", refusal)


def decode_product(
    config: E88Config,
    y: Array,
    gate_start: int,
    decay: Array,
    write_gate: Array | None,
    state: Array,
) -> tuple[Array, Array] | None:
    """For one token, all from the product of what reads the input to what the last one reads.

    It is for inference: it cannot be differentiated.

    Args:
        y: `[B, 1, columns]`: q and k of all heads, v of all, and somewhere the output gate.
        gate_start: the column where that begins, if there is one.
        decay, write_gate: `[B, 1, H]` float32.
        state: `[B, H, N, V]` float32; updated where it lies if nothing else reads it.

    Returns:
        The gated outputs `[B, 1, H * V]` in y's dtype, and the state after the token.
    """
    beyond_it = config.tie_kv or config.conv_size or config.value_residual or config.output_norm
    if (
        beyond_it
        or config.head_mix != "concat"
        or not recurrence.kernels_run(config.implementation)
    ):
        return None
    if refusal := kernels.import_refusal():
        return _left_to_xla("a layer's token", refusal)
    from pallas_kernels import decode

    layer = decode.DecodeConfig(
        _columns(config), config.output_gate, gate_start, config.linear_state
    )
    write_gate = None if write_gate is None else write_gate[:, 0]
    token = layer, y[:, 0], decay[:, 0], write_gate, state
    if refusal := kernels.lowering_refusal(decode.decode_layer, *token, gradient=False):
        return _left_to_xla("a layer's token", refusal)
    try:
        out, state = decode.decode_layer(*token)
    except NotImplementedError as refusal:
        return _left_to_xla("a layer's token", refusal)
    return out[:, None], state


def _left_to_xla(what: str, refusal: str | Exception) -> None:
    recurrence.log_once(f"XLA computes {what}: the kernel {refusal}")


def _columns(config: E88Config) -> Any:
    """How q, k and v lie in the product."""
    from pallas_kernels.qkv_activation import HeadColumns

    return HeadColumns(
        config.n_heads, config.n_state, config.n_value, config.use_silu, config.use_l2_norm
    )
