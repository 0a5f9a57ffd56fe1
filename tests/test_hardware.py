"""The GPU table, and the numbers of the scaling document."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predictions
from benchmarks.recorded import read
from e88_jax import hardware
from e88_jax.hardware import GPUS, find_gpu, optimal_n_state

STUDY = Path(__file__).parents[1] / "experiments/results/n_state_scaling_h100/results.json"

# Memory bandwidth in GB/s, "Tensor TFLOPS", optimal and maximal n_state, as printed.
PRINTED = {
    "rtx3090": (936, 35.6, (32, 32), 48),
    "rtx4090": (1008, 82.6, (32, 48), 64),
    "a100-40gb": (1555, 312, (48, 64), 96),
    "a100-80gb": (2039, 312, (64, 64), 96),
    "h100": (3350, 989, (64, 96), 128),
}


def test_the_published_table() -> None:
    published = {gpu.key: gpu.published for gpu in GPUS if gpu.published is not None}
    assert published.keys() == PRINTED.keys()
    for key, row in PRINTED.items():
        gpu = published[key]
        numbers = gpu.memory_bandwidth_GBps, gpu.tensor_tflops
        assert (*numbers, gpu.optimal_n_state, gpu.max_n_state) == row


def test_the_published_formula() -> None:
    by_formula = {key: find_gpu(key).formula_n_state for key in PRINTED}
    assert by_formula == {
        "rtx3090": 48,  # above the 32 that is printed
        "rtx4090": 48,
        "a100-40gb": 64,
        "a100-80gb": 64,
        "h100": 64,
    }
    # Of the tensor cores' rate it makes something else.
    assert optimal_n_state(1008, 165.2, 100) == 64
    # 99 operations a byte and 100; the memory decides below 10 KB only.
    assert (optimal_n_state(1000, 99.9, 228), optimal_n_state(1000, 100, 228)) == (48, 64)
    assert optimal_n_state(1000, 100, 9) == 32


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_bad_numbers(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        optimal_n_state(*numbers)


def test_vendors_numbers() -> None:
    assert len({gpu.key for gpu in GPUS}) == len(GPUS) == 10
    for gpu in GPUS:
        assert "NVIDIA" in gpu.source
        if gpu.published is not None:  # the two agree on bandwidth
            assert gpu.memory_bandwidth_GBps == gpu.published.memory_bandwidth_GBps
        # The tensor cores' rate, from SMs, clock and operations a cycle.
        per_cycle = gpu.bf16_tflops * 1e6 / gpu.n_sms / gpu.boost_clock_MHz
        rates = {(8, 0): 2048, (8, 6): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}
        rate = rates.get(gpu.compute_capability, 512 if "RTX 4090" in gpu.name else 1024)
        assert 0.9 * rate < per_cycle < 1.02 * rate, gpu.name


def test_measured_n_state_has_nearly_the_least_time_for_an_element() -> None:
    results = json.loads(STUDY.read_text())
    sweep = {row["n_state"]: row["both_ps_per_element"] for row in results["results"]}
    assert len(sweep) == 7
    least = min(sweep.values())
    best = tuple(n_state for n_state, ps in sweep.items() if ps < 1.1 * least)
    assert find_gpu(results["device"]).recommended_n_state == best == (32, 48, 64, 96, 128)


def test_predicted_n_state_is_that_of_the_recorded_times() -> None:
    shapes = read(predictions.BY_N_STATE)["shapes"]
    for gpu in GPUS:
        if gpu.measured_n_state is None:
            assert gpu.predicted_n_state == predictions.recommended_n_state(gpu, shapes), gpu.key
            assert gpu.recommended_n_state == gpu.predicted_n_state


def test_which_n_state_is_recommended_first() -> None:
    gpu = find_gpu("rtx4090")
    without = dataclasses.replace(gpu, predicted_n_state=None)
    unpublished = dataclasses.replace(without, published=None)
    found = [(x.how_n_state_is_known, x.recommended_n_state) for x in (gpu, without, unpublished)]
    assert found == [
        ("predicted", gpu.predicted_n_state),
        ("published", (32, 48)),
        ("by formula", (64,)),
    ]


def test_which_gpus_have_kernels() -> None:
    assert all(gpu.has_kernels for gpu in GPUS)
    capabilities = {(7, 5): False, (8, 0): True, (9, 0): True, (12, 1): True, (13, 0): False}
    for capability, runs in capabilities.items():
        gpu = dataclasses.replace(find_gpu("h100"), compute_capability=capability)
        assert gpu.has_kernels is runs


def test_states_of_the_scaling_document_in_kilobytes() -> None:
    assert [n * n * 4 / 1024 for n in (32, 64, 72, 96)] == [4, 16, 20.25, 36]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx-6000-ada", "rtx6000ada"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ],
)
def test_names(name: str, key: str) -> None:
    assert find_gpu(name).key == key


@pytest.mark.parametrize("name", ["a100", "NVIDIA H100 PCIe", "RTX 4090 Laptop GPU", ""])
def test_other_gpus_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=r"choose from rtx3090, .*, rtx6000ada"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("answer", "key"),
    [("NVIDIA H200\nNVIDIA L40S\n", "h200"), ("NVIDIA T4\nNVIDIA H200\n", None), ("", None)],
)
def test_detection(answer: str, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    found = hardware.detect_gpu()
    assert (found and found.key) == key


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError()]
)
def test_detection_without_a_driver(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert hardware.detect_gpu() is None
