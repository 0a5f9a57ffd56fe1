"""The kernels themselves, run by Pallas's interpreter with race detection, on few rows."""

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.hardware import find_gpu
from e88_jax.naive import Inputs
from pallas_kernels import target
from pallas_kernels.interpreter.jax_interpreter import InterpretGPUParams, reset_interpreter
from pallas_kernels.recurrence import TuningConfig, op, recurrence, tuning
from pallas_kernels.target import H100, Target
from tests.recurrence_calls import EVERY_OPTION, Tensors, make_inputs, rows_by
from tests.recurrence_contract import RecurrenceContract

RACES = InterpretGPUParams(detect_races=True)
AMPERE = find_gpu("a100-80gb").target


def on_either(names: str = "", *cases: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Each case on a GPU with bulk copies and on one without, with the dtypes in turn: how a tile
    is copied and what it holds do not act on each other."""
    rows = []
    for n, case in enumerate(cases or [()]):
        dtypes = ("bfloat16", "float32")[:: -1 if n % 2 else 1]
        rows += [(H100, dtypes[0], *case), (AMPERE, dtypes[1], *case)]
    ids = ["-".join(map(str, (tuning.copies(gpu), *rest))) for gpu, *rest in rows]
    return pytest.mark.parametrize(("gpu", "dtype", *names.split()), rows, ids=ids)


@pytest.fixture(autouse=True)
def no_races(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The interpreter takes every size.
    monkeypatch.setattr(op, "_require_supported", lambda q, v: None)
    reset_interpreter()
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


class TestInterpreted(RecurrenceContract):
    implementation = "mosaic_gpu, interpreted"
    dtypes = ("float32", "bfloat16")
    n_value = 8
    rows = MappingProxyType({"batch": 1, "heads": 1})
    quick_to_compile = dtypes
    compares_runs = supports_vmap = supports_sharding = False  # `test_op.py` does that
    uses_xla_memory = False

    gpu = H100

    def call(self, arrays: Tensors, *rows: Any, **options: Any) -> Any:
        copies = tuning.copies(self.gpu)
        for name in options.keys() & {"forward_config", "backward_config"}:
            options[name] = dataclasses.replace(options[name], copies=copies)
        with target.use(self.gpu):
            return rows_by(recurrence, arrays, *rows, interpret=RACES, **options)

    @on_either("heads", (1,), (2,), (4,))
    def test_tuning_configs(self, gpu: Target, dtype: str, heads: int) -> None:
        """Blocks of one to four heads, two blocks of columns, odd chunks, a head of padding."""
        self.gpu = gpu
        values = 32 // heads
        inputs = make_inputs(27, 12, values + 4, EVERY_OPTION, batch=1, heads=max(heads - 1, 1))
        self.check_against_numpy(
            _rounded(inputs, dtype),
            dtype,
            forward_config=TuningConfig(heads, values, chunk=24),
            backward_config=TuningConfig(heads, values, chunk=16),
        )

    @on_either()
    def test_forward_and_backward_that_pad_otherwise(self, gpu: Target, dtype: str) -> None:
        self.gpu = gpu
        inputs = make_inputs(27, 12, 12, EVERY_OPTION, batch=1, heads=3)
        self.check_against_numpy(
            _rounded(inputs, dtype),
            dtype,
            forward_config=TuningConfig(4, 8, chunk=24),
            backward_config=TuningConfig(1, 64, chunk=16),
        )

    @on_either("time chunk", (27, 8), (43, 16), (75, 32))
    def test_chunks(self, gpu: Target, dtype: str, time: int, chunk: int) -> None:
        """Groups of steps in two chunks or more; the last of each is short."""
        self.gpu = gpu
        inputs = make_inputs(time, 8, 32, EVERY_OPTION, batch=1, heads=1)
        config = TuningConfig(heads=1, values=32, chunk=chunk)
        self.check_against_numpy(
            _rounded(inputs, dtype),
            dtype,
            saved_state_interval=32,
            forward_config=config,
            backward_config=config,
        )

    @on_either("time chunk", (13, 16), (32, 16), (75, 32))
    def test_pipelined_groups(self, gpu: Target, dtype: str, time: int, chunk: int) -> None:
        """No whole chunk, whole chunks only, and a short one after two."""
        self.gpu = gpu
        inputs = make_inputs(time, 8, 32, EVERY_OPTION, batch=1, heads=1)
        self.check_against_numpy(
            _rounded(inputs, dtype),
            dtype,
            backward_config=TuningConfig(heads=1, values=32, chunk=chunk, pipelined=True),
        )

    @on_either("states_held alone", (4, 6), (3, 1))
    def test_half_of_a_group_held(
        self, gpu: Target, dtype: str, states_held: int, alone: int
    ) -> None:
        """Whole groups in two chunks, then one of 3 steps; and a group of few steps alone."""
        self.gpu = gpu
        config = TuningConfig(heads=1, values=32, chunk=16, states_held=states_held)
        for time in (35, alone):
            inputs = make_inputs(time, 8, 32, EVERY_OPTION, batch=1, heads=1)
            self.check_against_numpy(_rounded(inputs, dtype), dtype, backward_config=config)

    @on_either()
    def test_saved_states_far_apart(self, gpu: Target, dtype: str) -> None:
        """A whole segment of 64 steps, and one of 11."""
        self.gpu = gpu
        inputs = make_inputs(75, 4, 8, EVERY_OPTION, batch=1, heads=1)
        self.check_against_numpy(_rounded(inputs, dtype), dtype, saved_state_interval=33)

    @on_either()
    def test_warpgroups_side_by_side(self, gpu: Target, dtype: str) -> None:
        """Two blocks in thread blocks of three: one has nothing to do."""
        self.gpu = gpu
        inputs = make_inputs(11, 8, 32, ("write_gate",), batch=1, heads=2)
        three = TuningConfig(heads=1, values=32, chunk=8, warpgroups=3)
        self.check_against_numpy(
            _rounded(inputs, dtype), dtype, forward_config=three, backward_config=three
        )


def _rounded(inputs: Inputs, dtype: str) -> Inputs:
    """The inputs as the kernels get them: the reference does not round."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(jnp.dtype(dtype)).astype(np.float64)

    return inputs._replace(q=rounded(inputs.q), k=rounded(inputs.k), v=rounded(inputs.v))
