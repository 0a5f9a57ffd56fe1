"""Recurrences of the baselines, linear in their state: each with a sequential reference and a
chunk-parallel form in plain JAX, and GPU kernels of jax-linear-attention where it is installed."""

from e88_jax.ops.gated_delta_rule import gated_delta_rule
from e88_jax.ops.ssd import ssd

__all__ = ["gated_delta_rule", "ssd"]
