"""One token of an E88 layer between its two matmuls, as one kernel."""

from pallas_kernels.decode.config import DecodeConfig
from pallas_kernels.decode.op import decode_layer

__all__ = ["DecodeConfig", "decode_layer"]
