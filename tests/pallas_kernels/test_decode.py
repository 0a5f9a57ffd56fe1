from typing import Any

import pytest
from recurrence_contract import OPTIONS, RecurrenceContract, Tensors, make_inputs

from pallas_kernels import single_step


class SingleStep(RecurrenceContract):
    implementation = "single step"
    dtypes = ("float32", "bfloat16")

    def call(self, arrays: Tensors, segment_ids: Any = None, **options: Any) -> Any:
        arguments = {"write_gate": None, "initial_state": None, **arrays}
        return single_step(**arguments, linear_state=options["linear_state"])


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_single_step(options: tuple[str, ...]) -> None:
    SingleStep().check_against_numpy(make_inputs(1, 4, 6, options), "float32")
