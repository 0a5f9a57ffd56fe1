"""The recurrence, and what surrounds it, as Pallas kernels for Hopper and datacenter Blackwell."""

from pallas_kernels.decode import single_step
from pallas_kernels.geometry import Geometry
from pallas_kernels.support import unsupported
from pallas_kernels.tuning import backward_geometry, forward_geometry
from pallas_kernels.vjp import recurrence

__all__ = [
    "Geometry",
    "backward_geometry",
    "forward_geometry",
    "recurrence",
    "single_step",
    "unsupported",
]
