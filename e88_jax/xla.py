"""XLA's options for a training step."""

import os

from pallas_kernels import target

GPU_OPTIONS: dict[str, str | bool] = {
    # XLA fuses the concatenation of a matmul's gradients into a Triton GEMM, then prefers cuBLAS
    # and keeps copies of the parts.
    "xla_gpu_enable_triton_gemm": False,
    # CUDA graphs are updated at every step, as the arrays' addresses change.
    "xla_gpu_enable_command_buffer": "",
    # XLA merges a layer's two matmuls if they are small, and copies the parts.
    "xla_gpu_dot_merger_threshold_mb": "0",
}
"""XLA's options for the training step on a GPU; flags of the same name in `XLA_FLAGS` win.
The log in `benchmarks/README.md` has the gain of each."""


def xla_options() -> dict[str, str | bool]:
    """XLA's options for a training step, for `compiler_options` of `jax.jit`: `GPU_OPTIONS`
    without those that XLA_FLAGS sets; none if the device is no GPU."""
    if target.current().platform != "gpu":
        return {}
    chosen = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in GPU_OPTIONS.items() if f"--{name}" not in chosen}
