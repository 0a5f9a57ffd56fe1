"""Differences between the versions of JAX that `pyproject.toml` allows."""

# 0.10.2 has them in a private module only.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as _interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams", "interpreter_found_races", "reset_interpreter"]


def interpreter_found_races() -> bool:
    """Whether the interpreter's latest kernel, run with `detect_races`, raced."""
    return _interpreter.get_races().races_found


def reset_interpreter() -> None:
    """Makes the interpreter usable after an error inside of a kernel."""
    _interpreter.reset_gpu_interpret_mode_state()
