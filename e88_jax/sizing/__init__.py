"""Parameters, state, memory, operations and balance of models; from a budget to a configuration.

`python -m e88_jax.sizing --help` does the same on the command line. Nothing here imports JAX.
"""

from e88_jax.sizing.balance import Finding, balance, check, d_inner_of
from e88_jax.sizing.flops import Flops, training_flops
from e88_jax.sizing.memory import TrainingMemory, state_bytes, state_per_layer, training_memory
from e88_jax.sizing.parameters import calc_e88_params, count_params
from e88_jax.sizing.presets import (
    PRESETS,
    Preset,
    find_preset,
    gated_deltanet_state_per_layer,
    mamba2_state_per_layer,
)
from e88_jax.sizing.solve import Solution, parse_params, solve

__all__ = [
    "PRESETS",
    "Finding",
    "Flops",
    "Preset",
    "Solution",
    "TrainingMemory",
    "balance",
    "calc_e88_params",
    "check",
    "count_params",
    "d_inner_of",
    "find_preset",
    "gated_deltanet_state_per_layer",
    "mamba2_state_per_layer",
    "parse_params",
    "solve",
    "state_bytes",
    "state_per_layer",
    "training_flops",
    "training_memory",
]
