"""The recurrence: forward and backward kernels, and a single step in plain JAX."""

from pallas_kernels.recurrence.op import recurrence
from pallas_kernels.recurrence.plain_step import single_step
from pallas_kernels.recurrence.tuning_config import TuningConfig

__all__ = ["TuningConfig", "recurrence", "single_step"]
