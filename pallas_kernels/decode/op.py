"""One token of a layer between its two matmuls: activations, the recurrence, the output gate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Ref
from pallas_kernels.common.batching import over_rows
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.mosaic import inline
from pallas_kernels.common.sizes import WARPS
from pallas_kernels.decode.config import DecodeConfig
from pallas_kernels.decode.lanes import token_of_row
from pallas_kernels.limits import require_supported


def decode_layer(
    config: DecodeConfig, x: Array, decay: Array, write_gate: Array | None, state: Array
) -> tuple[Array, Array]:
    """SiLU and unit length of q, k and v, a step of the recurrence, and the output gate.

    Args:
        config: columns of x, and what is computed.
        x: the first matmul's output `[B, columns]`, float32 or bfloat16.
        decay: `[B, H]` float32.
        write_gate: `[B, H]` float32, or None for 1.
        state: `[B, H, N, V]` float32; updated in place if nothing else reads it.

    Returns:
        The gated outputs `[B, H * V]` in x's dtype, and the state after the token.

    Raises:
        NotImplementedError: sizes or a dtype that the kernel does not take.
        ValueError: an empty batch, or another dtype than float32 of decay, write_gate or state.
    """
    require_supported(config.columns.n_state, config.columns.n_value, x.dtype.name)
    if len(x) == 0:
        raise ValueError(f"no axis may be empty, got x of shape {x.shape}.")
    for name, array in (("decay", decay), ("write_gate", write_gate), ("state", state)):
        if array is not None and array.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32, got {array.dtype}.")
    return _call(config)(x, decay, write_gate, state)


@functools.cache
def _call(config: DecodeConfig) -> Callable[..., tuple[Array, Array]]:
    def call(x: Array, decay: Array, write_gate: Array | None, state: Array) -> tuple[Array, Array]:
        groups = -(-config.warps // WARPS)
        inputs = {"x": x, "decay": decay, "write_gate": write_gate}
        inputs = {name: array for name, array in inputs.items() if array is not None}
        names = [*inputs, "state", "out"]

        def body(*refs: Ref) -> None:
            index = lax.axis_index("block")
            row, group = lax.div(index, jnp.int32(groups)), lax.rem(index, jnp.int32(groups))

            def emit(_: Any, group: Any, *refs: Ref) -> None:
                memory = dict(zip(names, map(Memory, refs), strict=True))
                token_of_row(LaneOps(), config, group.registers.item(), memory)

            types = (plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs))
            inline(emit, group, *(ref.at[row] for ref in refs), arg_types=types)

        columns = config.columns
        shape = state.shape[0], columns.n_heads * columns.n_value
        run: Any = pl.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(shape, x.dtype),
            mesh=plgpu.Mesh(grid=(state.shape[0] * groups,), grid_names=("block",)),
            compiler_params=plgpu.CompilerParams(
                unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            name="e88_decode_layer",
        )

        def in_place(refs: tuple[Ref, Ref]) -> None:
            out_ref, state_ref = refs
            out_ref[...] = run(*inputs.values(), state_ref)

        # A reference made here would be a side effect, which a partitioned function cannot have.
        return pl.run_state(in_place)((jnp.zeros(shape, x.dtype), state))

    return over_rows(
        call,
        ("b c", "b h", "b h", "b h n v"),
        lambda *_: ("b d", "b h n v"),
        partition=True,
        no_derivative="a token of a model made for inference cannot be differentiated.",
    )
