from typing import Any

import pytest

from pallas_kernels.recurrence import single_step
from tests.recurrence_calls import OPTIONS, Tensors, make_inputs, rows_by
from tests.recurrence_contract import RecurrenceContract


class SingleStep(RecurrenceContract):
    implementation = "single step"
    dtypes = ("float32", "bfloat16")

    def call(self, arrays: Tensors, *rows: Any, **options: Any) -> Any:
        def step(*x: Any, saved_state_interval: int, linear_state: bool) -> Any:
            q, k, v, decay, write_gate, state, _, live = x
            return single_step(q, k, v, decay, write_gate, state, live, linear_state=linear_state)

        return rows_by(step, arrays, *rows, **options)


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_single_step(options: tuple[str, ...]) -> None:
    SingleStep().check_against_numpy(make_inputs(1, 4, 8, options), "float32")
