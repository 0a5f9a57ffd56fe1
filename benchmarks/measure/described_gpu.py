"""A GPU that is not there, described so that JAX compiles for it.

No GPU is used, nor looked for; JAX's CUDA plugin is, as in `jax[cuda13]`.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from experiments.cli.errors import UsageError
from pallas_kernels import target
from pallas_kernels.limits import BULK_COPIES_FROM
from pallas_kernels.target import Target

# GEMMs cannot be timed against each other: they are left to cuBLAS.
FLAGS = "--xla_gpu_autotune_level=0"


def _description(of: Target) -> str:
    """XLA's GpuTargetConfigProto.

    Registers, barriers and grids are the same from compute capability 8.0 to 12.0. Clocks,
    bandwidth, memory and cache are the H100's: they serve XLA's estimates of time, not the kernels.
    Sources: those of `target.H100`.
    """
    assert of.compute_capability is not None
    assert of.shared_memory_per_sm is not None
    major, minor = of.compute_capability
    # From 9.0 on kernels are compiled for one architecture, such as sm_90a.
    own = "feature_extension: ACCELERATED_FEATURES" if (major, minor) >= BULK_COPIES_FROM else ""
    threads = 1536 if (major, minor) in ((8, 6), (8, 9), (12, 0)) else 2048
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  core_count: {of.n_sms}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {of.shared_memory_per_block}
  shared_memory_per_core: {of.shared_memory_per_sm}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 84942979072 device_address_bits: 64
  cuda_compute_capability {{ major: {major} minor: {minor} {own} }}
  device_vendor: "NVIDIA Corporation" name: "{of.name}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{of.name}"
"""


@contextlib.contextmanager
def compiling_for(gpu: Target, n: int = 1) -> Iterator[list[Any]]:
    """Inside, programs are lowered for n of these GPUs on one host; gives these as devices.

    Arguments of `jax.jit` are sharded over them, and
    `trace(...).lower(lowering_platforms=("cuda",)).compile()` follow.

    Raises:
        UsageError: JAX has no CUDA plugin, or aborts on such kernels.
    """
    assert gpu.compute_capability is not None
    if refusal := target.jax_refusal(gpu):
        raise UsageError(f"compiling {refusal}.")
    devices = _devices(gpu, n)  # before JAX is imported
    from jax.experimental.mosaic import gpu as mgpu

    # Mosaic asks the local device, and takes it for an H100 if it is none.
    infer: Any = mock.patch.object(mgpu.utils, "_infer_arch", return_value=gpu.compute_capability)
    with target.use(gpu), infer:
        yield devices


@functools.cache
def _devices(gpu: Target, n: int) -> list[Any]:
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries to run with

    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    if gpu.compute_capability == target.H100.compute_capability:
        _answer_for_a_hopper()
    try:
        topology = topologies.get_topology_desc(
            gpu.name, platform="cuda", topology=f"1x1x{n}", target_config=_description(gpu)
        )
    except NotImplementedError as error:
        raise UsageError(f"JAX has no CUDA plugin ({error}): pip install 'jax[cuda13]'.") from None
    return list(topology.devices)


def _answer_for_a_hopper() -> None:
    """jax-linear-attention asks the local device, not the one that is compiled for, whether it is a
    Hopper GPU: from here on the answer is yes."""
    from e88_jax.ops import hopper

    if importlib.util.find_spec(hopper.PACKAGE) is None:
        return
    for name in ("_common", "scalar_gate", "scalar_gate_kb"):
        module: Any = importlib.import_module(f"{hopper.PACKAGE}.ops.mosaic_gpu.{name}")
        module.is_hopper = lambda: True
