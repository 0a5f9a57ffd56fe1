"""GPUs that models are sized for: their numbers, and which n_state suits them. Imports no JAX."""

import dataclasses
import math
import re
import subprocess
from typing import Any

from e88_jax.checks import require_instance, require_number
from pallas_kernels.limits import COMPUTE_CAPABILITY_BELOW, MIN_COMPUTE_CAPABILITY
from pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the scaling document's table, as printed there.

    Its "Tensor TFLOPS" of the GeForce cards are those of their float32 units, not of their tensor
    cores.
    """

    memory_bandwidth_GBps: float
    tensor_tflops: float
    optimal_n_state: tuple[int, int]
    """From and to."""
    max_n_state: int


@dataclasses.dataclass(frozen=True)
class GPU:
    """One GPU: numbers of its vendor, and of the scaling document where that has it.

    KB are 1024 bytes, GB 1e9 (memory as the vendor counts it).
    """

    name: str
    key: str
    """Name on the command line."""
    device_names: tuple[str, ...]
    """Names by the driver."""
    compute_capability: tuple[int, int]
    n_sms: int
    boost_clock_MHz: int
    memory_GB: int
    memory_bandwidth_GBps: int
    bf16_tflops: float
    """Dense rate of the tensor cores with float32 accumulation."""
    shared_memory_KB: int
    """Shared memory of an SM."""
    source: str
    published: Published | None = None
    measured_n_state: tuple[int, ...] | None = None
    """Sizes at which the kernels' forward + backward takes at most a tenth more than the least time
    per state element, of those timed: `experiments/results/n_state_scaling_h100/`."""
    predicted_n_state: tuple[int, ...] | None = None
    """The same by the predictions of `benchmarks/predictions.py`, from times on an H100."""

    @property
    def formula_n_state(self) -> int:
        """`optimal_n_state` from the scaling document's numbers, else from the vendor's."""
        tflops = self.published.tensor_tflops if self.published else self.bf16_tflops
        return optimal_n_state(self.memory_bandwidth_GBps, tflops, self.shared_memory_KB)

    @property
    def recommended_n_state(self) -> tuple[int, ...]:
        """Sizes, ascending: measured, else predicted, else the multiples of 16 of the published
        range, else the formula's."""
        if found := self.measured_n_state or self.predicted_n_state:
            return found
        if self.published:
            low, high = self.published.optimal_n_state
            return tuple(range(low, high + 1, 16))
        return (self.formula_n_state,)

    @property
    def how_n_state_is_known(self) -> str:
        """Where `recommended_n_state` comes from."""
        if self.measured_n_state:
            return "measured"
        if self.predicted_n_state:
            return "predicted"
        return "published" if self.published else "by formula"

    @property
    def has_kernels(self) -> bool:
        """Whether the recurrence runs by `pallas_kernels` there, not by `lax.scan`."""
        return MIN_COMPUTE_CAPABILITY <= self.compute_capability < COMPUTE_CAPABILITY_BELOW

    @property
    def target(self) -> Target:
        """The GPU as programs are built for it."""
        return Target(
            "gpu",
            self.device_names[0],
            compute_capability=self.compute_capability,
            n_sms=self.n_sms,
            # The driver keeps 1 KB of each thread block. Source: CUDA Programming Guide.
            shared_memory_per_block=1024 * (self.shared_memory_KB - 1),
            shared_memory_per_sm=1024 * self.shared_memory_KB,
        )


_CUDA_GUIDE = "CUDA Programming Guide, compute capabilities (shared memory)"
_AMPERE = f"NVIDIA A100 Tensor Core GPU data sheet and architecture white paper; {_CUDA_GUIDE}"
_RTX_BLACKWELL = f"NVIDIA RTX Blackwell GPU Architecture white paper, table 3; {_CUDA_GUIDE}"

GPUS: tuple[GPU, ...] = (
    GPU(
        name="RTX 3090",
        key="rtx3090",
        device_names=("GeForce RTX 3090",),
        compute_capability=(8, 6),
        n_sms=82,
        boost_clock_MHz=1695,
        memory_GB=24,
        memory_bandwidth_GBps=936,
        bf16_tflops=71.2,
        shared_memory_KB=100,
        source=f"NVIDIA Ampere GA102 GPU Architecture white paper, table 9; {_CUDA_GUIDE}",
        published=Published(936, 35.6, (32, 32), 48),
        predicted_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="RTX 4090",
        key="rtx4090",
        device_names=("GeForce RTX 4090",),
        compute_capability=(8, 9),
        n_sms=128,
        boost_clock_MHz=2520,
        memory_GB=24,
        memory_bandwidth_GBps=1008,
        bf16_tflops=165.2,
        shared_memory_KB=100,
        source=f"NVIDIA Ada GPU Architecture white paper, table 2; {_CUDA_GUIDE}",
        published=Published(1008, 82.6, (32, 48), 64),
        predicted_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="A100 40GB",
        key="a100-40gb",
        device_names=("A100-SXM4-40GB", "A100-PCIE-40GB"),
        compute_capability=(8, 0),
        n_sms=108,
        boost_clock_MHz=1410,
        memory_GB=40,
        memory_bandwidth_GBps=1555,
        bf16_tflops=312.0,
        shared_memory_KB=164,
        source=_AMPERE,
        published=Published(1555, 312, (48, 64), 96),
        predicted_n_state=(32, 64, 96, 128),
    ),
    GPU(
        name="A100 80GB",
        key="a100-80gb",
        device_names=("A100-SXM4-80GB", "A100 80GB PCIe"),
        compute_capability=(8, 0),
        n_sms=108,
        boost_clock_MHz=1410,
        memory_GB=80,
        memory_bandwidth_GBps=2039,
        bf16_tflops=312.0,
        shared_memory_KB=164,
        source=f"{_AMPERE}; SXM4 (PCIe: 1,935 GB/s)",
        published=Published(2039, 312, (64, 64), 96),
        predicted_n_state=(32, 64, 96, 128),
    ),
    GPU(
        name="H100",
        key="h100",
        device_names=("H100 80GB HBM3",),
        compute_capability=(9, 0),
        n_sms=132,
        boost_clock_MHz=1980,
        memory_GB=80,
        memory_bandwidth_GBps=3350,
        bf16_tflops=989.4,
        shared_memory_KB=228,
        source=f"NVIDIA H100 data sheet and architecture white paper, SXM5; {_CUDA_GUIDE}",
        published=Published(3350, 989, (64, 96), 128),
        measured_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="H200",
        key="h200",
        device_names=("H200",),
        compute_capability=(9, 0),
        n_sms=132,
        boost_clock_MHz=1980,
        memory_GB=141,
        memory_bandwidth_GBps=4800,
        bf16_tflops=989.5,
        shared_memory_KB=228,
        source=f"NVIDIA H200 data sheet, SXM (half of the sparse rate); {_CUDA_GUIDE}",
        predicted_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="B200",
        key="b200",
        device_names=("B200",),
        compute_capability=(10, 0),
        n_sms=148,
        boost_clock_MHz=1965,
        memory_GB=180,
        memory_bandwidth_GBps=7700,
        bf16_tflops=2250.0,
        shared_memory_KB=228,
        source=f"NVIDIA HGX B200 data sheet (half of the sparse rate; SMs and clock as "
        f"its driver tells); {_CUDA_GUIDE}",
        predicted_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="RTX 5090",
        key="rtx5090",
        device_names=("GeForce RTX 5090",),
        compute_capability=(12, 0),
        n_sms=170,
        boost_clock_MHz=2407,
        memory_GB=32,
        memory_bandwidth_GBps=1792,
        bf16_tflops=209.5,
        shared_memory_KB=100,
        source=_RTX_BLACKWELL,
        predicted_n_state=(32, 48, 64, 96, 128),
    ),
    GPU(
        name="L40S",
        key="l40s",
        device_names=("L40S",),
        compute_capability=(8, 9),
        n_sms=142,
        boost_clock_MHz=2520,
        memory_GB=48,
        memory_bandwidth_GBps=864,
        bf16_tflops=362.05,
        shared_memory_KB=100,
        source=f"NVIDIA L40S data sheet; {_CUDA_GUIDE}",
        predicted_n_state=(64, 96, 128),
    ),
    GPU(
        name="RTX 6000 Ada",
        key="rtx6000ada",
        device_names=("RTX 6000 Ada Generation",),
        compute_capability=(8, 9),
        n_sms=142,
        boost_clock_MHz=2505,
        memory_GB=48,
        memory_bandwidth_GBps=960,
        bf16_tflops=364.2,
        shared_memory_KB=100,
        source=f"NVIDIA RTX PRO Blackwell GPU Architecture white paper, table 4; {_CUDA_GUIDE}",
        predicted_n_state=(64, 96, 128),
    ),
)


def optimal_n_state(
    memory_bandwidth_GBps: float, tensor_tflops: float, shared_mem_KB: float
) -> int:
    """The scaling document's formula, unchanged.

    Its limit by shared memory never decides: 100 KB give 107, above both 48 and 64.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a number that is not finite and above 0.
    """
    for name, value in (
        ("memory_bandwidth_GBps", memory_bandwidth_GBps),
        ("tensor_tflops", tensor_tflops),
        ("shared_mem_KB", shared_mem_KB),
    ):
        if require_number(name, value) <= 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
    ops_per_byte = tensor_tflops * 1e12 / (memory_bandwidth_GBps * 1e9)
    max_n_from_shared = int(math.sqrt(shared_mem_KB * 1024 / 4 / 2.2))
    optimal = min(48 if ops_per_byte < 100 else 64, max_n_from_shared)
    return (optimal // 8) * 8


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))


def find_gpu(name: str) -> GPU:
    """The GPU with this key, name or driver's name; case, spaces and dashes do not matter.

    Raises:
        TypeError: the name is no string.
        ValueError: no such GPU; the message lists those there are.
    """
    require_instance("name", name, str)
    for gpu in GPUS:
        if _plain(name) in map(_plain, (gpu.key, gpu.name, *gpu.device_names)):
            return gpu
    raise ValueError(f"unknown GPU {name!r}: choose from {', '.join(gpu.key for gpu in GPUS)}.")


def require_gpu(gpu: Any) -> None:
    """Raises:
    TypeError: it is neither a GPU nor None.
    """
    if gpu is not None:
        require_instance("gpu", gpu, GPU, "None or a GPU, such as hardware.find_gpu('h100')")


def detect_gpu() -> GPU | None:
    """The first GPU that nvidia-smi lists, or None if there is none or it is not in the table."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return find_gpu(answer.stdout.splitlines()[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None
