"""The decode kernel: one token of an E88 layer between its two matmuls, for inference on a GPU."""

from jax import Array

from e88_jax import kernels
from e88_jax.config import E88Config
from e88_jax.mixers.base import Implementation


def require(config: E88Config, implementation: Implementation | None) -> None:
    """Raises:
    NotImplementedError: the kernel does not run on the target, or not with these options.
    """
    kernels.require(implementation)
    if config.tie_kv or config.conv_size or config.value_residual or config.output_norm:
        raise kernels.NotWorthIt("takes no tie_kv, conv_size, value_residual or output_norm")
    if config.head_mix != "concat":
        raise kernels.NotWorthIt(f"takes head_mix concat, got {config.head_mix}")


def decode(
    config: E88Config,
    y: Array,
    gate_start: int,
    decay: Array,
    write_gate: Array | None,
    state: Array,
) -> tuple[Array, Array]:
    """SiLU, unit length, a step of the recurrence and the output gate; not differentiable.

    Args:
        config: sizes and options that `require` takes.
        y: `[B, 1, columns]`: q, k and v of each head, `[H, 2N + V]`, and from `gate_start` on the
            output gate, `[H, V]`, if there is one.
        gate_start: first column of the output gate.
        decay, write_gate: `[B, 1, H]` float32.
        state: `[B, H, N, V]` float32; updated in place if nothing else reads it.

    Returns:
        The gated outputs `[B, 1, H, V]` in y's dtype, and the state after the token.

    Raises:
        NotImplementedError: the kernel does not take these sizes, or JAX cannot lower it.
    """
    from pallas_kernels.decode import DecodeConfig, decode_layer

    layer = DecodeConfig(
        kernels.head_columns(config), config.output_gate, gate_start, config.linear_state
    )
    write_gate = None if write_gate is None else write_gate[:, 0]
    token = layer, y[:, 0], decay[:, 0], write_gate, state
    out, state = kernels.call(decode_layer, *token, gradient=False)
    return out.reshape(out.shape[0], 1, config.n_heads, config.n_value), state
