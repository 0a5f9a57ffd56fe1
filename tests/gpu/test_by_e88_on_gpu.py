"""The gated delta rule by E88's kernels on the GPU, against the scan in float32."""

import numpy as np
import pytest

from e88_jax.ops import hopper
from pallas_kernels import target
from tests.ops.inputs import GATED_DELTA_RULE, OPTIONS, Size, evaluate, make_call, rounded
from tests.recurrence_calls import assert_tensors_close

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)

BOUND = {"bfloat16": 8e-3, "float32": 1e-4}
SIZES = [Size(2, 65, 4, 4, 32, 32), Size(2, 500, 1, 3, 31, 30), Size(1, 129, 2, 2, 128, 64)]


@pytest.mark.parametrize("left_out", [(), OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_scan(
    size: Size, dtype: str, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "PACKAGE", "no_such_package")
    call = make_call(GATED_DELTA_RULE, size).without(*left_out)
    if dtype == "bfloat16":
        narrow = {name: rounded(call.arrays[name]) for name in GATED_DELTA_RULE.narrow}
        call = call.changed(**narrow)._replace(
            cotangents=(rounded(call.cotangents[0]), call.cotangents[1])
        )
    actual = evaluate(GATED_DELTA_RULE, "mosaic_gpu", call, dtype)
    expected = evaluate(GATED_DELTA_RULE, "scan", call, "float32")
    assert all(np.isfinite(x).all() for x in actual.values())
    assert_tensors_close(actual, expected, BOUND[dtype])
