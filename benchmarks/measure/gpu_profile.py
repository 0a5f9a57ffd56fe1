"""GPU time by part of the training step, from JAX's profiler."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

COMMUNICATION = "communication"
PARTS = {
    COMMUNICATION: re.compile("nccl|AllReduce|AllGather|ReduceScatter", re.IGNORECASE),
    "recurrence forward": re.compile("e88_forward"),
    "recurrence backward": re.compile("e88_backward"),
    # cuBLAS, CUTLASS, and GEMMs that XLA compiles.
    "matmuls": re.compile("nvjet|gemm|gemv|cutlass|cublas|xmma|splitK", re.IGNORECASE),
}
"""Kernels of each part by name, first match first. The rest is `ELSE`."""
ELSE = "everything else"


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    start_ns: float
    duration_ns: float


def profile(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels that the first GPU ran during `run()`, which must wait for its results.

    Raises:
        RuntimeError: it ran no kernel.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        kernels = [
            Kernel(event.name, event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name == "/device:GPU:0"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not kernels:
        raise RuntimeError("the profile has no kernel of a GPU.")
    return kernels


def part_of(name: str) -> str:
    """The part of the step that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if pattern.search(name)), ELSE)


def breakdown(kernels: Iterable[Kernel], steps: int) -> dict[str, float]:
    """Milliseconds of a step by part, and of those in which no kernel ran, `idle`, between the
    first and the last."""
    kernels = sorted(kernels, key=lambda kernel: kernel.start_ns)
    ms = dict.fromkeys([*PARTS, ELSE], 0.0)
    idle, busy_until = 0.0, kernels[0].start_ns if kernels else 0.0
    for kernel in kernels:
        ms[part_of(kernel.name)] += kernel.duration_ns
        idle += max(0.0, kernel.start_ns - busy_until)
        busy_until = max(busy_until, kernel.start_ns + kernel.duration_ns)
    return {part: ns / steps / 1e6 for part, ns in {**ms, "idle": idle}.items()}


def alone_ms(kernels: Iterable[Kernel], part: str, steps: int) -> float:
    """Milliseconds of a step in which kernels of this part ran and no others.

    A kernel of communication waits for the other GPUs: that is counted too.
    """
    edges: list[tuple[float, int, bool]] = []
    for kernel in kernels:
        of_part, end = part_of(kernel.name) == part, kernel.start_ns + kernel.duration_ns
        edges += [(kernel.start_ns, 1, of_part), (end, -1, of_part)]
    running = {True: 0, False: 0}
    total, since = 0.0, 0.0
    for time, change, of_part in sorted(edges):
        if running[True] and not running[False]:
            total += time - since
        running[of_part] += change
        since = time
    return total / steps / 1e6


def longest(kernels: Iterable[Kernel], steps: int, n: int) -> list[dict[str, Any]]:
    """The n names that took the most time: milliseconds and calls a step, and the part."""
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        durations[kernel.name].append(kernel.duration_ns)
    rows = [
        {
            "name": name,
            "ms": sum(ns) / steps / 1e6,
            "calls": len(ns) / steps,
            "part": part_of(name),
        }
        for name, ns in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:n]
