"""What a layer computes between its matrix products by one kernel, where there is one.

Each function gives None where there is none: for this device, these sizes or options, or for
`implementation="scan"`. Then XLA computes the same.
"""

from typing import Any

from jax import Array

from e88_jax import recurrence
from e88_jax.config import E88Config


def activate_product(config: E88Config, y: Array) -> tuple[Array, Array, Array, Array] | None:
    """`activation.activate` for q, k and v side by side.

    Args:
        y: `[B, T, columns]`: q and k of all heads, v of all, and whatever else.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]` and the columns after theirs, in y's dtype.
    """
    if config.tie_kv or config.conv_size or not recurrence.kernels_run(config.implementation):
        return None
    from pallas_kernels import activation  # not every platform's jaxlib has what it imports

    split = _split(config)
    if (refusal := split.unsupported(y.shape[-1], y.dtype)) is not None:
        recurrence.log_once(f"XLA computes SiLU and unit length: the kernel {refusal}")
        return None
    return activation.activate(split, y)


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
    from pallas_kernels import decode_layer

    layer = decode_layer.Layer(_split(config), config.output_gate, gate_start, config.linear_state)
    if layer.unsupported(y.dtype) is not None:
        return None
    write_gate = None if write_gate is None else write_gate[:, 0]
    out, state = decode_layer.decode_layer(layer, y[:, 0], decay[:, 0], write_gate, state)
    return out[:, None], state


def _split(config: E88Config) -> Any:
    """How q, k and v lie in the product."""
    from pallas_kernels.activation import Split

    return Split(
        config.n_heads, config.n_state, config.n_value, config.use_silu, config.use_l2_norm
    )
