"""Times of the recurrence on GPUs that were not at hand, from those of their kernels on an H100.

`benchmarks.recurrence --as-gpu` times the kernels as another GPU takes them: its copies, its shared
memory. From there arithmetic goes on:

- as many cycles on an SM, the other GPU's number of SMs and boost clock: the lower end of a range;
- its slower units added, as if no other work hid them: the upper end;
- no less than its memory takes for the arrays read and written; where the level-2 cache is small,
  also for what the cache is to hold: the upper end.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from e88_jax import hardware
from e88_jax.hardware import GPU
from experiments.markdown import Table

RECORDED = "benchmarks/results/recurrence_as_other_gpus.json"
BY_N_STATE = "benchmarks/results/recurrence_by_n_state.json"
TIMED_AS = "h100", "a100-80gb", "rtx4090"
"""GPUs as which the kernels were timed: one of each kind of copies and amount of shared memory."""
H100 = hardware.find_gpu("h100")

SCHEDULERS = 4
"""Warp schedulers of an SM. Source: CUDA Programming Guide, compute capabilities."""
UNIT = 8 * 32
"""State elements of a unit, a warp's 8 columns of 32 keys: 8 of a lane."""
FLOAT_INSTRUCTIONS = {"forward": 39, "forward+backward": 39 + 64}
"""Multiplications, additions and FMAs in float32 for a unit and step, by the PTX of the inner loops
at N = V = 32 in bfloat16."""
MMA_CYCLES = {"forward": 0, "forward+backward": 12 * 4.1}
"""Cycles of the tensor cores for a unit and step on an H100: mmas of the same PTX, and cycles of
each, `pallas_kernels/README.md`."""
MMA_FLOPS = 2048
"""FLOP that an SM of an H100 does in a cycle by such mmas in bfloat16: half of its peak, for which
it needs `wgmma`, and an A100's peak."""
FLOAT_LANES = {(8, 0): 64}
"""Lanes of an SM for float32, of 128 elsewhere from compute capability 8.0 to 12.0. Source: CUDA
C++ Programming Guide, throughput of arithmetic instructions."""

SMALL_CACHE = ("rtx3090",)
"""GPUs whose level-2 cache may not hold the states of half of each group, which the backward kernel
leaves in device memory: at N = 64 they take 6.7 MB on an RTX 3090, whose cache has 6 MB. Source:
NVIDIA Ampere GA102 GPU Architecture white paper. The other GPUs have 40 MB and more."""
NEARLY = 1.1
"""As `GPU.measured_n_state`: time of an element, relative to the least."""

Record: TypeAlias = Mapping[str, Any]


class Range(NamedTuple):
    """A prediction, in milliseconds."""

    low: float
    high: float
    by_memory: bool
    """Whether the lower end is the memory's."""

    def __str__(self) -> str:
        ends = (f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in (self.low, self.high))
        return " to ".join(dict.fromkeys(ends))


def timed_as(gpu: GPU) -> str:
    """The GPU among `TIMED_AS` whose kernels this one takes."""

    def kind(gpu: GPU) -> tuple[bool, int | None]:
        uses_bulk_copies = gpu.target.uses_bulk_copies
        memory = None if uses_bulk_copies else gpu.target.shared_memory_per_block
        return uses_bulk_copies, memory

    return next(key for key in TIMED_AS if kind(hardware.find_gpu(key)) == kind(gpu))


def predicted(gpu: GPU, shape: Record, name: str) -> Range:
    """The time of a pass, from the file's entry for the kernels that the GPU takes.

    Args:
        gpu: the other GPU.
        shape: the entry.
        name: "forward", or "forward+backward".
    """
    assert shape["as_gpu"] == timed_as(gpu)
    numbers = shape["passes"][name]
    clock = numbers["clock_mhz"] or H100.boost_clock_MHz  # nvidia-smi may have given none
    cycles = numbers["ms"] * H100.n_sms * clock
    per_ms = gpu.n_sms * gpu.boost_clock_MHz
    added = shape["elements"] / UNIT / SCHEDULERS * _slower_cycles(gpu, name) / 1e3
    of_arrays = _bytes(shape, name)
    of_states = _bytes_of_earlier_states(shape) if name != "forward" else 0
    most = of_arrays + (of_states if gpu.key in SMALL_CACHE else 0)
    memory, at_most = (n / (gpu.memory_bandwidth_GBps * 1e6) for n in (of_arrays, most))
    low, high = cycles / per_ms, (cycles + added) / per_ms
    return Range(max(low, memory), max(high, at_most), memory > low)


def recommended_n_state(gpu: GPU, shapes: Sequence[Record]) -> tuple[int, ...]:
    """Sizes N = V at which an element of state takes nearly the least time, forward + backward, in
    the middle of the predicted range.

    Args:
        shapes: the entries of `BY_N_STATE`.
    """
    own = [shape for shape in shapes if shape["as_gpu"] == timed_as(gpu)]
    ranges = [predicted(gpu, shape, "forward+backward") for shape in own]
    times = {
        shape["N"]: (x.low + x.high) / shape["elements"]
        for shape, x in zip(own, ranges, strict=True)
    }
    return tuple(n for n, time in sorted(times.items()) if time < NEARLY * min(times.values()))


def _slower_cycles(gpu: GPU, name: str) -> float:
    """More cycles of a scheduler for a unit and step than on an H100, if nothing hides them."""
    capability = gpu.compute_capability
    floats = FLOAT_INSTRUCTIONS[name] * (128 / FLOAT_LANES.get(capability, 128) - 1)
    # From 9.0 on the peak is that of other instructions; these are taken to be as on an H100.
    if (9, 0) <= capability < (12, 0):
        return floats
    flops = gpu.bf16_tflops * 1e6 / (gpu.n_sms * gpu.boost_clock_MHz)
    return floats + MMA_CYCLES[name] * max(0.0, MMA_FLOPS / flops - 1)


def _bytes(shape: Record, name: str) -> int:
    """Bytes read and written in bfloat16, without a write gate; gradients save a state every 8
    steps, in bfloat16, and delta, in float32. Blocks of 32 columns give partial sums of d_q and
    d_k, which are added."""
    n = shape["N"]
    forward = 2 * 4 * n + 4  # q, k, v, out; decay
    saved = 4 * n + 2 * n * n // 8
    sums = -(-n // 32)
    d_keys = 2 * 2 * n * (1 if sums == 1 else 2 * sums + 1)
    backward = 2 * 3 * n + 4 + saved + d_keys + 2 * n + 4  # q, k, d_out, decay; d_v, d_decay
    per_step = forward if name == "forward" else forward + saved + backward
    return shape["B"] * shape["T"] * shape["H"] * per_step


def _bytes_of_earlier_states(shape: Record) -> int:
    """Bytes of the states of half of each group, written and read in bfloat16; up to N = 16 all
    states are in shared memory."""
    n = shape["N"]
    return 0 if n <= 16 else shape["B"] * shape["T"] * shape["H"] * 2 * (4 * 2 * n * n) // 8


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on another GPU."""

    recurrence_ms: Range
    matmuls_ms: float
    others_ms: float

    def tokens_per_second(self, tokens: int) -> tuple[float, float]:
        """From and to."""
        rest = self.matmuls_ms + self.others_ms
        low, high = self.recurrence_ms.low + rest, self.recurrence_ms.high + rest
        return 1e3 * tokens / high, 1e3 * tokens / low


def measured(shapes: Sequence[Record]) -> Table:
    """Forward + backward of each shape, by kernels as the GPUs of `TIMED_AS` take them."""
    by_name: dict[str, dict[str, Record]] = {}
    for shape in shapes:
        by_name.setdefault(shape["name"], {})[shape["as_gpu"]] = shape
    rows = [
        [
            f"({', '.join(str(of_gpu[TIMED_AS[0]][axis]) for axis in 'BTHN')})",
            *(
                " + ".join(f"{of_gpu[key]['passes'][x]['ms']:.3f}" for x in ("forward", "backward"))
                for key in TIMED_AS
            ),
        ]
        for of_gpu in by_name.values()
    ]
    return ["(B, T, H, N = V)", *(hardware.find_gpu(key).name for key in TIMED_AS)], rows


def by_n_state(shapes: Sequence[Record]) -> Table:
    """Picoseconds of an element of state, forward + backward, by N = V, and by kernels as the GPUs
    of `TIMED_AS` take them."""
    sizes = dict.fromkeys(shape["N"] for shape in shapes)
    rows = [
        [
            hardware.find_gpu(key).name,
            *(
                f"{x['passes']['forward+backward']['ps_per_element']:.2f}"
                for x in shapes
                if x["as_gpu"] == key
            ),
        ]
        for key in TIMED_AS
    ]
    return ["N = V", *map(str, sizes)], rows


def gpus(
    shapes: Sequence[Record], point: Record, layers: int, published: Mapping[str, str]
) -> Table:
    """Predictions of a training step and its recurrence, for every GPU that was not at hand.

    Args:
        shapes: entries of the file; the first of each GPU is the step's recurrence.
        point: an H100's step (`benchmarks.train_step`).
        layers: of its model.
        published: tokens/s of other implementations, by the GPU's key.
    """
    first = {shape["as_gpu"]: shape for shape in reversed(shapes)}
    data = point["config"]["data"]
    rows = []
    for gpu in hardware.GPUS:
        if gpu.compute_capability == H100.compute_capability:
            continue
        shape = first[timed_as(gpu)]
        passes = [predicted(gpu, shape, name) for name in ("forward", "forward+backward")]
        of_step = step(gpu, shape, point["part_ms"], layers)
        rates = of_step.tokens_per_second(data["seq_len"] * data["batch_size"])
        rows.append(
            [
                gpu.name,
                *map(str, passes),
                f"{of_step.matmuls_ms:.0f}, {of_step.recurrence_ms}, {of_step.others_ms:.0f}",
                " to ".join(dict.fromkeys(f"{rate:,.0f}" for rate in rates)),
                published.get(gpu.key, ""),
            ]
        )
    header = ["GPU", "forward, ms", "forward + backward, ms"]
    return [*header, "matmuls, recurrence, others, ms", "tokens/s", "published"], rows


def step(gpu: GPU, shape: Record, parts: Record, layers: int) -> Step:
    """From the parts of an H100's step: matmuls by the tensor cores' rate, everything else by the
    memory's bandwidth, the recurrence as `predicted`."""
    recurrence = predicted(gpu, shape, "forward+backward")
    return Step(
        Range(layers * recurrence.low, layers * recurrence.high, recurrence.by_memory),
        parts["matmuls"] * H100.bf16_tflops / gpu.bf16_tflops,
        (parts["everything else"] + parts["idle"])
        * (H100.memory_bandwidth_GBps / gpu.memory_bandwidth_GBps),
    )
