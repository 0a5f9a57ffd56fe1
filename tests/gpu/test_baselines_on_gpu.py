"""The kernels of jax-linear-attention on the GPU that they are for, against the scan in float32."""

import importlib.util

import numpy as np
import pytest

from e88_jax.ops import hopper
from pallas_kernels import target
from tests.ops.inputs import (
    GATED_DELTA_RULE,
    OPS,
    OPTIONS,
    SSD,
    Call,
    Op,
    Size,
    evaluate,
    make_call,
    rounded,
)
from tests.recurrence_calls import Tensors, assert_tensors_close

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)
if importlib.util.find_spec(hopper.PACKAGE) is None:
    pytest.skip("mosaic_gpu needs jax-linear-attention", allow_module_level=True)

BOUND = 8e-3
"""Of ||x - scan|| / ||scan||, per tensor; the kernels round states and products to bfloat16."""
BOUND_OF_A = 2e-2
"""Of the gradient of ssd's `a`: a sum over all rows and steps, whose terms cancel."""

SIZES = {
    GATED_DELTA_RULE: [
        Size(2, 65, 2, 2, 128, 256),
        Size(2, 500, 2, 6, 128, 256),
        Size(1, 2048, 4, 4, 128, 256),
        Size(2, 65, 3, 3, 128, 128),
        Size(2, 500, 2, 4, 128, 128),
        Size(2, 65, 1, 4, 64, 64),
        Size(1, 2048, 5, 5, 64, 64),
    ],
    SSD: [
        Size(2, 65, 1, 6, 128, 64),
        Size(2, 500, 1, 6, 128, 64),
        Size(1, 2048, 1, 8, 128, 64),
        Size(2, 65, 3, 3, 128, 64),
        Size(2, 500, 3, 3, 128, 64),
    ],
}
CASES = [(op, size) for op in OPS for size in SIZES[op]]


def rounded_call(op: Op, size: Size) -> Call:
    """A call whose numbers bfloat16 holds, where the kernels take bfloat16."""
    call = make_call(op, size)
    call = call.changed(**{name: rounded(call.arrays[name]) for name in op.narrow})
    d_out, d_final_state = call.cotangents
    return call._replace(cotangents=(rounded(d_out), d_final_state))


def check(op: Op, call: Call) -> None:
    close_to_the_scan(op, call, evaluate(op, "mosaic_gpu", call, "bfloat16"))


def close_to_the_scan(op: Op, call: Call, actual: Tensors) -> None:
    expected = evaluate(op, "scan", call, "float32")
    of_a = {"d_a": actual.pop("d_a")} if "d_a" in actual else {}
    assert_tensors_close(of_a, {name: expected.pop(name) for name in of_a}, BOUND_OF_A)
    assert_tensors_close(actual, expected, BOUND)


@pytest.mark.parametrize(("op", "size"), CASES, ids=str)
@pytest.mark.parametrize("left_out", [(), OPTIONS, OPTIONS[:1]], ids=str)
def test_against_the_scan(op: Op, size: Size, left_out: tuple[str, ...]) -> None:
    check(op, rounded_call(op, size).without(*left_out))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_documents_start_about_a_border(op: Op) -> None:
    """At a chunk's first step, at the one before, at the one after, and at each step."""
    call = rounded_call(op, SIZES[op][1]._replace(batch=4, time=130))
    ids = np.zeros((4, 130), np.int32)
    for row, start in enumerate((64, 63, 65)):
        ids[row, start:] = 1
    ids[3] = np.arange(130)
    check(op, call._replace(segment_ids=ids))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_what_is_past_the_end_is_not_read(op: Op) -> None:
    call = rounded_call(op, SIZES[op][1]._replace(batch=4, time=130))
    lengths = np.array([130, 65, 1, 0], np.int32)
    call = call._replace(lengths=lengths)
    padded = {name: np.array(x) for name, x in call.arrays.items()}
    for x in padded.values():
        if x.shape[:2] == (4, 130):
            x[np.arange(130) >= lengths[:, None]] = np.nan
    clean = evaluate(op, "mosaic_gpu", call, "bfloat16")
    dirty = evaluate(op, "mosaic_gpu", call._replace(arrays=padded), "bfloat16")
    for name, x in clean.items():
        np.testing.assert_array_equal(dirty[name], x, err_msg=name)
    close_to_the_scan(op, call, dirty)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_default(op: Op) -> None:
    """The kernels, of more than one step; of one step the scan."""
    for time, implementation in ((1, "scan"), (65, "mosaic_gpu")):
        call = rounded_call(op, SIZES[op][0]._replace(time=time))
        default, named = (evaluate(op, x, call, "bfloat16") for x in (None, implementation))
        for name, x in named.items():
            np.testing.assert_array_equal(default[name], x, err_msg=name)


@pytest.mark.parametrize(("op", "size"), [(op, SIZES[op][1]) for op in OPS], ids=str)
def test_runs_are_bitwise_equal(op: Op, size: Size) -> None:
    call = rounded_call(op, size._replace(batch=8))
    first, second = (evaluate(op, "mosaic_gpu", call, "bfloat16") for _ in range(2))
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_chunk_form_on_the_gpu(op: Op) -> None:
    """In float32 as exact as the scan, and in TF32 of bfloat16 inputs nearly."""
    call = rounded_call(op, SIZES[op][1])
    expected = evaluate(op, "scan", call, "float32")
    assert_tensors_close(evaluate(op, "chunked", call, "float32"), expected, 2e-5)
    close_to_the_scan(op, call, evaluate(op, "chunked", call, "bfloat16"))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_sizes_that_they_do_not_take(op: Op) -> None:
    call = rounded_call(op, SIZES[op][0]._replace(n_key=48))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        evaluate(op, "mosaic_gpu", call, "bfloat16")
    default, named = (evaluate(op, x, call, "bfloat16") for x in (None, "chunked"))
    for name, x in named.items():
        np.testing.assert_array_equal(default[name], x, err_msg=name)
