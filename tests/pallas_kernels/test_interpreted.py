"""The kernels themselves, run by Pallas's interpreter with race detection, on few rows."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_contract import EVERY_OPTION, RecurrenceContract, Tensors, make_inputs

from pallas_kernels import Geometry, recurrence
from pallas_kernels.compat import InterpretGPUParams, reset_interpreter

RACES = InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    reset_interpreter()
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


class Interpreted(RecurrenceContract):
    implementation = "mosaic_gpu, interpreted"
    dtypes = ("float32", "bfloat16")
    n_value = 8
    rows = MappingProxyType({"batch": 1, "heads": 1})
    supports_sharding = False  # `test_vjp.py` does that
    uses_xla_memory = False
    geometries: Any = {}

    def call(self, arrays: Tensors, segment_ids: Any = None, **options: Any) -> Any:
        arguments = {"write_gate": None, "initial_state": None, **arrays}
        options = {"linear_state": False, "checkpoint_every": 32, **self.geometries, **options}
        return recurrence(**arguments, segment_ids=segment_ids, interpret=RACES, **options)


class TestInterpreted(Interpreted):
    pass
