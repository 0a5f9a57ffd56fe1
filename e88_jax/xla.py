"""XLA's options for training steps and the programs of experiments."""

import os

from pallas_kernels import target

_EARLY = "xla_gpu_experimental_collective_start_as_early_as_possible"
GPU_OPTIONS: dict[str, str | bool] = {
    # XLA fuses the concatenation of a matmul's gradients into a Triton GEMM, then prefers cuBLAS
    # and keeps copies of the parts.
    "xla_gpu_enable_triton_gemm": False,
    # CUDA graphs are updated at every step, as the arrays' addresses change.
    "xla_gpu_enable_command_buffer": "",
    # XLA merges a layer's two matmuls if they are small, and copies the parts.
    "xla_gpu_dot_merger_threshold_mb": "0",
    # By default one exchange with other GPUs is under way at a time, and as late as possible, so
    # that gradients are summed after the backward pass.
    _EARLY: True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": "1000",
}
"""XLA's options for the training step, on one or several GPUs; flags of the same name in
`XLA_FLAGS` win. The log in `benchmarks/README.md` has the gain of each."""


def xla_options(
    *, autotune: bool = True, gathered_bytes: int | None = None, divides_rows: bool = True
) -> dict[str, str | bool]:
    """XLA's options for a program, for `compiler_options` of `jax.jit`: `GPU_OPTIONS`
    without those that XLA_FLAGS sets; none if the device is no GPU.

    Args:
        autotune: time the algorithms of each matmul while compiling. It holds the GPU alone, so
            that a training beside it waits; a small model runs as fast without.
        gathered_bytes: where weights are divided over GPUs, the bytes of a layer's weights in the
            compute dtype: XLA joins gathers up to so many, and so gathers layer by layer.
        divides_rows: whether GPUs have rows of their own, if there are several. Where they have
            parts of the heads alone, an exchange begun early would take the gradients of all
            weights to run beside it, which exchanges of other layers then wait without.
    """
    if target.current().platform != "gpu":
        return {}
    options = dict(GPU_OPTIONS)
    if not autotune:
        options["xla_gpu_autotune_level"] = "0"
    if not divides_rows:
        options[_EARLY] = False
    if gathered_bytes is not None:
        options["xla_gpu_all_gather_combine_threshold_bytes"] = str(gathered_bytes)
    chosen = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in options.items() if f"--{name}" not in chosen}
