"""The kernels lowered for a GPU that need not be there: layouts, alignment, sizes of copies."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import pytest

from e88_jax.hardware import find_gpu
from pallas_kernels import target
from pallas_kernels.recurrence import TuningConfig, recurrence

# (B, T, H, N, V)
MODELS = {
    "A": (8, 2048, 72, 32, 32),
    "B": (8, 512, 384, 32, 32),
    "C": (1, 2048, 72, 32, 32),
    "D": (8, 2048, 40, 64, 64),
    "E": (4, 2048, 16, 128, 128),
    "F": (8, 2048, 48, 48, 48),
}
ODD = {
    "decoding": (4, 1, 8, 32, 32),
    "shorter than a chunk": (2, 5, 8, 32, 32),
    "T 31": (2, 31, 5, 16, 16),
    "T 2049, H 83": (2, 2049, 83, 48, 48),
    "H 1": (3, 100, 1, 12, 20),
    "V < N": (2, 64, 6, 128, 4),
    "V > N": (2, 64, 6, 4, 128),
    "V of 100": (2, 64, 3, 72, 100),
    "70,000 blocks": (70_000, 64, 1, 32, 32),
    "2**31 elements": (65, 8192, 128, 32, 32),
}


def in_turn(cases: Iterable[Any], *dtypes: str) -> list[tuple[Any, str]]:
    """Each case with one of the dtypes, which differ in bytes and alignment alone."""
    return list(zip(cases, itertools.cycle(dtypes), strict=False))


def lower(
    shape: tuple[int, int, int, int, int],
    dtype: str,
    options: tuple[str, ...] = (),
    gradient: bool = True,
    saved_state_interval: int = 32,
    config: TuningConfig | None = None,
) -> int:
    """Number of kernels in the program of the results and, by default, the gradients."""
    batch, time, heads, n_state, n_value = shape

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    per_step = (batch, time, heads)
    arrays = {
        "q": array(*per_step, n_state, dtype=dtype),
        "k": array(*per_step, n_state, dtype=dtype),
        "v": array(*per_step, n_value, dtype=dtype),
        "decay": array(*per_step),
        "write_gate": array(*per_step) if "write_gate" in options else None,
        "initial_state": (
            array(batch, heads, n_state, n_value) if "initial_state" in options else None
        ),
    }
    marks = {
        name: array(batch, time, dtype="bool") if option in options else None
        for name, option in {"starts": "segment_ids", "live": "lengths"}.items()
    }
    cotangents = arrays["v"], array(batch, heads, n_state, n_value)

    def results(arrays: Any, marks: Any) -> Any:
        return recurrence(
            **arrays,
            **marks,
            linear_state="linear_state" in options,
            saved_state_interval=saved_state_interval,
            forward_config=config,
            backward_config=config,
        )

    def program(arrays: Any, marks: Any, cotangents: Any) -> Any:
        if not gradient:
            return results(arrays, marks)
        both, pullback = jax.vjp(lambda arrays: results(arrays, marks), arrays)
        return both, pullback(cotangents)

    traced = jax.jit(program).trace(arrays, marks, cotangents)
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    assert lower(MODELS[name], "bfloat16") == 2


@pytest.mark.parametrize(("name", "dtype"), in_turn(ODD, "float32", "bfloat16"))
def test_odd_shapes(name: str, dtype: str) -> None:
    assert lower(ODD[name], dtype) == 2


@pytest.mark.parametrize(("name", "dtype"), in_turn(MODELS | ODD, "bfloat16", "float32"))
def test_asynchronous_copies(name: str, dtype: str) -> None:
    with target.use(find_gpu("a100-80gb").target):
        assert lower((MODELS | ODD)[name], dtype) == 2


@pytest.mark.parametrize(
    ("options", "dtype"),
    in_turn(
        [
            ("write_gate",),
            ("initial_state",),
            ("segment_ids",),
            ("lengths",),
            ("write_gate", "initial_state", "segment_ids", "lengths", "linear_state"),
        ],
        "float32",
        "bfloat16",
    ),
)
def test_options(options: tuple[str, ...], dtype: str) -> None:
    shape = 2, 70, 4, 32, 32
    assert lower(shape, dtype, options) == 2


def test_options_where_shared_memory_is_full() -> None:
    options = "write_gate", "segment_ids", "lengths"
    with target.use(target.H100):
        assert lower((4, 64, 128, 44, 44), "float32", options) == 2


@pytest.mark.parametrize(
    ("config", "dtype"),
    in_turn(
        [
            TuningConfig(heads=1, values=32, chunk=8, warpgroups=3),
            TuningConfig(heads=1, values=64, chunk=8, unroll=1),
            TuningConfig(heads=2, values=16, chunk=16, warpgroups=2),
            TuningConfig(heads=4, values=16, chunk=8),
            TuningConfig(heads=1, values=32, chunk=32),
            TuningConfig(heads=2, values=32, chunk=16, pipelined=True),
            TuningConfig(heads=2, values=16, chunk=16, states_held=4, copies="async"),
            TuningConfig(heads=1, values=32, chunk=8, states_held=3, copies="async"),
            TuningConfig(heads=1, values=32, chunk=8, states_held=3),
        ],
        "float32",
        "bfloat16",
    ),
    ids=str,
)
def test_tuning_configs(config: TuningConfig, dtype: str) -> None:
    options = "write_gate", "segment_ids"
    assert lower((2, 75, 4, 32, 64), dtype, options, config=config) == 2


def test_results_alone_take_one_kernel() -> None:
    assert lower((2, 70, 4, 32, 32), "bfloat16", gradient=False) == 1


@pytest.mark.parametrize("size", range(4, 128, 12))
def test_sizes(size: int) -> None:
    """Every remainder of a block's 32 columns, from the smallest state to nearly the largest."""
    # Each dtype meets rows that end before a block does, and are read past their end.
    dtype = "float32" if size % 8 else "bfloat16"
    assert lower((2, 100, 4, size, size), dtype, ("write_gate", "segment_ids")) == 2


def test_states_between_saved_ones_are_recomputed_by_another_forward_kernel() -> None:
    shape = 2, 600, 4, 32, 32
    assert lower(shape, "bfloat16", saved_state_interval=256) == 5  # whole segments and the last
