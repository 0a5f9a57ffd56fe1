"""Timing of compiled programs: the median of many calls, and the GPU's clock meanwhile."""

import itertools
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

REPETITION_SECONDS = 0.025

Numbers = dict[str, Any]


class ClockSampler:
    """Reads the SM clock by nvidia-smi, again and again in a thread while its `with` block runs."""

    def __init__(self) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        self._query = ["nvidia-smi", f"--id={visible or 0}", "--format=csv,noheader,nounits"]
        self._samples: list[tuple[float, float]] = []  # seconds, MHz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "ClockSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def query(self, what: str) -> str | None:
        """nvidia-smi's answer, or None without one."""
        try:
            command = [*self._query, f"--query-gpu={what}"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    def _sample(self) -> None:
        while not self._stop.is_set():
            answer = self.query("clocks.sm")
            if answer is None and not self._samples:
                break  # no nvidia-smi; later it may fail once
            if answer is not None and answer.isdecimal():
                self._samples.append((time.perf_counter(), float(answer)))
            self._stop.wait(0.01)

    def median_mhz(self, start: float, stop: float) -> float | None:
        """Median clock between two times of `time.perf_counter`; None without samples."""
        samples = [mhz for second, mhz in self._samples if start <= second <= stop]
        return statistics.median(samples) if samples else None


def time_calls(
    program: Callable[..., Any],
    input_sets: Sequence[dict[str, jax.Array]],
    repetitions: int,
    clock: ClockSampler,
) -> Numbers:
    """Milliseconds of one call, median and spread over the repetitions, and the clock meanwhile.

    A repetition enqueues several calls and waits once, so that the time to launch is hidden. Each
    call gets the next of `input_sets`, the first after the last.
    """
    sets = itertools.cycle(input_sets)

    def seconds(calls: int) -> float:
        began = time.perf_counter()
        result = None
        for _ in range(calls):
            result = program(**next(sets))
        jax.block_until_ready(result)
        return time.perf_counter() - began

    compile_seconds = seconds(1)
    seconds(2)
    calls = min(max(round(REPETITION_SECONDS / (seconds(2) / 2)), 1), 100)
    began = time.perf_counter()
    ms = [1e3 * seconds(calls) / calls for _ in range(repetitions)]
    p10, p50, p90 = (round(float(x), 6) for x in np.percentile(ms, (10, 50, 90)))
    return {
        "ms": p50,
        "p10_ms": p10,
        "p90_ms": p90,
        "calls_per_repetition": calls,
        "compile_seconds": round(compile_seconds, 1),
        "clock_mhz": clock.median_mhz(began, time.perf_counter()),
    }
