"""Parameters, state, memory and balance of models; from a budget to a configuration.

`python -m e88_jax.sizing --help` does the same on the command line. Nothing here imports JAX.
"""

from e88_jax.sizing.compare import Match, compare
from e88_jax.sizing.guide import calc_e88_params, d_inner_of, e88_layer
from e88_jax.sizing.memory import TrainingMemory, state_bytes, training_memory
from e88_jax.sizing.presets import BASELINES, PRESETS, Baseline, Preset, find_preset
from e88_jax.sizing.proportions import Finding, balance, check
from e88_jax.sizing.search import Solution, parse_params, solve

__all__ = [
    "BASELINES",
    "PRESETS",
    "Baseline",
    "Finding",
    "Match",
    "Preset",
    "Solution",
    "TrainingMemory",
    "balance",
    "calc_e88_params",
    "check",
    "compare",
    "d_inner_of",
    "e88_layer",
    "find_preset",
    "parse_params",
    "solve",
    "state_bytes",
    "training_memory",
]
