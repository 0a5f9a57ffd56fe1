"""Predictions for other GPUs are arithmetic on an H100's times."""

import dataclasses
from typing import Any

import pytest

from benchmarks import predictions
from benchmarks.predictions import TIMED_AS, predicted, step, timed_as
from e88_jax.hardware import GPUS, find_gpu
from pallas_kernels.recurrence.tuning import backward_config, copies, forward_config

H100, A100, RTX4090 = (find_gpu(key) for key in TIMED_AS)


def entry(
    as_gpu: str, forward: float = 1.0, both: float = 3.0, n: int = 32, heads: int = 72
) -> dict[str, Any]:
    sizes = {"B": 8, "T": 2048, "H": heads, "N": n}
    passes, elements = {"forward": forward, "forward+backward": both}, 8 * 2048 * heads * n * n
    return {
        **sizes,
        "as_gpu": as_gpu,
        "elements": elements,
        "passes": {
            name: {"ms": ms, "clock_mhz": 1980, "ps_per_element": ms * 1e9 / elements}
            for name, ms in passes.items()
        },
    }


def test_every_gpu_takes_the_kernels_that_were_timed_for_it() -> None:
    of = {gpu.key: timed_as(gpu) for gpu in GPUS}
    assert {of[key] for key in ("h100", "h200", "b200")} == {"h100"}
    assert {of[key] for key in ("a100-40gb", "a100-80gb")} == {"a100-80gb"}
    others = {"rtx3090", "rtx4090", "rtx5090", "l40s", "rtx6000ada"}
    assert {of[key] for key in others} == {"rtx4090"}
    for gpu in GPUS:
        # As many SMs, so that the same work is divided.
        own, other = (
            dataclasses.replace(x.target, n_sms=H100.n_sms) for x in (gpu, find_gpu(of[gpu.key]))
        )
        assert copies(own) == copies(other)
        for choose in (forward_config, backward_config):
            assert choose(8, 40, 64, 64, own, "bfloat16") == choose(
                8, 40, 64, 64, other, "bfloat16"
            )


def test_an_h100_is_predicted_as_it_was_timed() -> None:
    for name in ("forward", "forward+backward"):
        found = predicted(H100, entry("h100"), name)
        assert found.low == found.high == pytest.approx({"forward": 1.0}.get(name, 3.0))
        assert not found.by_memory
    parts = {"matmuls": 60.0, "everything else": 30.0, "idle": 1.0}
    of_step = step(H100, entry("h100"), parts, layers=20)
    assert (of_step.matmuls_ms, of_step.others_ms) == (60.0, 31.0)
    assert of_step.tokens_per_second(16_384)[0] == pytest.approx(16_384 / 0.151)


def test_sms_and_clock_count() -> None:
    doubled = dataclasses.replace(H100, n_sms=264)
    halved = dataclasses.replace(H100, boost_clock_MHz=990)
    assert predicted(doubled, entry("h100"), "forward").low == pytest.approx(0.5)
    assert predicted(halved, entry("h100"), "forward").low == pytest.approx(2.0)


def test_slower_units_are_the_upper_end() -> None:
    """Cycles of a scheduler for 256 elements: 39 more for an A100's float32 forward, 147 more for a
    GeForce's mmas backward."""
    units = entry("a100-80gb")["elements"] / 256 / 4
    forward = predicted(A100, entry("a100-80gb"), "forward")
    assert forward.high - forward.low == pytest.approx(units * 39 / (108 * 1410) / 1e3, rel=1e-6)
    assert predicted(RTX4090, entry("rtx4090"), "forward").high == pytest.approx(
        132 * 1980 / (128 * 2520)
    )
    both = predicted(RTX4090, entry("rtx4090"), "forward+backward")
    more = units * 12 * 4.1 * (2048 / (165.2e6 / (128 * 2520)) - 1) / (128 * 2520) / 1e3
    assert both.high - both.low == pytest.approx(more, rel=1e-6)
    assert more == pytest.approx(0.54, abs=0.01)


@pytest.mark.parametrize(
    ("n", "of_a_step"),
    # A state every 8 steps both ways; two partial sums of d_q and d_k at 64.
    [(32, 28 * 32 + 32**2 // 2 + 12), (64, 28 * 64 + 64**2 // 2 + 12 + 4 * 64 * 4)],
)
def test_no_faster_than_the_memory(n: int, of_a_step: int) -> None:
    fast = predicted(RTX4090, entry("rtx4090", both=0.01, n=n), "forward+backward")
    assert fast.by_memory
    assert fast.low == pytest.approx(8 * 2048 * 72 * of_a_step / 1008e9 * 1e3)


def test_states_in_device_memory_count_where_the_cache_is_small() -> None:
    """4 states of 8 are written and read."""
    small, large = (
        predicted(find_gpu(key), entry("rtx4090", both=0.01), "forward+backward")
        for key in ("rtx3090", "rtx4090")
    )
    assert large.low == large.high
    of_states = 8 * 2048 * 72 / 8 * 4 * 2 * (2 * 32 * 32)
    assert small.high - small.low == pytest.approx(of_states / 936e9 * 1e3)
    narrow = entry("rtx4090", both=0.01, n=16)
    assert len(set(predicted(find_gpu("rtx3090"), narrow, "forward+backward")[:2])) == 1


def test_recommended_n_state_takes_nearly_the_least_time_for_an_element() -> None:
    """At one width an element's share is the time over N."""
    ms = {16: 1.2, 32: 2.0, 48: 3.5, 64: 4.2, 96: 9.0}
    shapes = [entry("h100", both=x, n=n, heads=2304 // n) for n, x in ms.items()]
    others = [entry("rtx4090", both=1.0, n=128, heads=18)]
    assert predictions.recommended_n_state(H100, [*shapes, *others]) == (32, 64)
    header, rows = predictions.by_n_state(shapes)
    assert header == ["N = V", "16", "32", "48", "64", "96"]
    assert rows[0][:2] == ["H100", "1.99"]


def test_the_table_has_every_gpu_that_was_not_at_hand() -> None:
    shapes = [entry(key) for key in TIMED_AS]
    parts = {"matmuls": 60.0, "everything else": 30.0, "idle": 1.0}
    point = {"config": {"data": {"seq_len": 2048, "batch_size": 8}}, "part_ms": parts}
    _, rows = predictions.gpus(shapes, point, 20, {"rtx4090": "18-21K"})
    assert [row[0] for row in rows] == [x.name for x in GPUS if x.compute_capability != (9, 0)]
    assert [row[-1] for row in rows if row[-1]] == ["18-21K"]
