"""JAX's interpreter of GPU kernels, under one name for every JAX that `pyproject.toml` allows."""

# JAX 0.10.2 has them in a private module only.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as _interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams", "reset_interpreter"]


def reset_interpreter() -> None:
    """Makes the interpreter usable after an error inside of a kernel."""
    _interpreter.reset_gpu_interpret_mode_state()
