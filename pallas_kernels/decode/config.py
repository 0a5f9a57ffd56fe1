"""The columns that the decode kernel reads, and what it computes of them. Imports no JAX."""

import dataclasses
from typing import Literal

from pallas_kernels.common.sizes import LANES
from pallas_kernels.qkv_activation.columns import HeadColumns


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Columns of the first matmul's output, and options of the layer.

    Attributes:
        columns: q, k and v, which come first.
        gate: activation of the output gate.
        gate_start: first column of the gate, `[H, V]`; unused without a gate.
        linear_state: leave out the tanh.
    """

    columns: HeadColumns
    gate: Literal["silu", "sigmoid", "none"]
    gate_start: int
    linear_state: bool

    @property
    def warps(self) -> int:
        """Warps of a row of the batch."""
        return self.columns.n_heads * self.warps_per_head

    @property
    def warps_per_head(self) -> int:
        """Warps of a head, each with up to 32 columns of its state."""
        return -(-self.columns.n_value // LANES)
