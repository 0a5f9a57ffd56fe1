"""The gated delta rule as E88's recurrence: the same results and gradients."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from e88_jax import kernels
from e88_jax.ops import by_e88, gated_delta_rule, hopper
from e88_jax.ops.sequential import sequential
from e88_jax.reference import scan_recurrence
from pallas_kernels import target
from tests.ops.inputs import GATED_DELTA_RULE, Size, Tensors, make_call, quick_jit, tensors
from tests.recurrence_calls import assert_tensors_close

BOUND = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 8e-3}
"""bfloat16 rounds v / alpha once more than v."""


def by_definition(*arrays: Array | None) -> tuple[Array, Array]:
    return sequential(*arrays, None, delta_rule=True)  # pyright: ignore


def by_scan(*arrays: Array | None) -> tuple[Array, Array]:
    x = by_e88.as_e88(*arrays)  # pyright: ignore[reportArgumentType]
    return scan_recurrence(*x, None, None, linear_state=True, saved_state_interval=8)


NAMES = "q", "k", "v", "log_decay", "write_gate", "initial_state"


@functools.partial(quick_jit, static_argnums=0)
def results(
    function: Callable[..., tuple[Array, Array]], arrays: Tensors, cotangents: tuple[Array, Array]
) -> Tensors:
    (out, state), pullback = jax.vjp(function, *(arrays[name] for name in NAMES))
    gradients = zip(NAMES, pullback(cotangents), strict=True)
    return {"out": out, "final_state": state} | {f"d_{name}": x for name, x in gradients}


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (Size(2, 17, 1, 3, 4, 8), "float64"),
        (Size(1, 9, 2, 2, 31, 5), "float32"),
        (Size(2, 17, 1, 3, 4, 8), "bfloat16"),
    ],
    ids=str,
)
def test_equals_the_definition(size: Size, extreme: bool, dtype: str) -> None:
    with jax.enable_x64(True):
        call = make_call(GATED_DELTA_RULE, size).without("segment_ids", "lengths")
        if extreme:
            call = call._replace(arrays=GATED_DELTA_RULE.extreme_decays(call.arrays))
        arrays = tensors(GATED_DELTA_RULE, call, dtype)
        wide = "float64" if dtype == "float64" else "float32"
        d_out, d_state = call.cotangents
        cotangents = jnp.asarray(d_out, dtype), jnp.asarray(d_state, wide)
        actual, expected = (
            {k: np.asarray(x, "float64") for k, x in results(f, arrays, cotangents).items()}
            for f in (by_scan, by_definition)
        )
        assert all(np.isfinite(x).all() for x in actual.values())
        assert_tensors_close(actual, expected, BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_by_the_kernels_where_others_refuse(
    dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Programs for a GPU have E88's kernels, padded, and nothing falls back."""
    monkeypatch.setattr(hopper, "PACKAGE", "no_such_package")
    call = make_call(GATED_DELTA_RULE, Size(2, 40, 2, 4, 31, 30)).without("lengths")
    arrays = tensors(GATED_DELTA_RULE, call, dtype)
    run = functools.partial(gated_delta_rule, segment_ids=jnp.asarray(call.segment_ids))
    kernels.log_once.cache_clear()
    with target.use(target.H100), caplog.at_level(logging.INFO):
        program = jax.jit(run).trace(**arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in program
    assert not [r for r in caplog.records if r.name.startswith("e88_jax")]


def test_refuses_large_heads() -> None:
    call = make_call(GATED_DELTA_RULE, Size(1, 4, 1, 1, 8, 132)).without("lengths", "segment_ids")
    arrays = tensors(GATED_DELTA_RULE, call, "float32")
    with (
        target.use(target.H100),
        pytest.raises(NotImplementedError, match=r"E88's kernels: .*up to 128, got 132"),
    ):
        gated_delta_rule(**arrays, implementation="mosaic_gpu")
