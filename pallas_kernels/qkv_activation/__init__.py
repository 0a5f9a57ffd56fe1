"""SiLU and unit length of q, k and v, straight from the matmul that computes them side by side."""

from pallas_kernels.qkv_activation.columns import HeadColumns
from pallas_kernels.qkv_activation.op import activate

__all__ = ["HeadColumns", "activate"]
