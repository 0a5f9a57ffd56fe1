"""The kernels on the GPU that they are for: everything that the op takes."""

import dataclasses
import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from e88_jax.naive import rms_ratio
from e88_jax.recurrence import e88_recurrence
from pallas_kernels import target
from pallas_kernels.recurrence import TuningConfig
from pallas_kernels.recurrence import recurrence as by_kernels
from tests.recurrence_calls import (
    EVERY_OPTION,
    SIZES,
    Tensors,
    make_cotangents,
    make_inputs,
    rows_by,
    tensors,
)
from tests.recurrence_contract import RecurrenceContract

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)

# Of ||x - scan|| / ||scan||, per tensor; the scan in float32.
BOUNDS = {"float32": 2e-5, "bfloat16": 4e-3}
SIZES_OF_STATES = range(4, 129, 4)

Op = Callable[..., Any]
SCAN = functools.partial(e88_recurrence, implementation="scan")
MOSAIC_GPU = functools.partial(e88_recurrence, implementation="mosaic_gpu")


def kernels_alone(**options: Any) -> Op:
    def op(*, segment_ids: Any, linear_state: bool, **arrays: Any) -> Any:
        return rows_by(by_kernels, arrays, segment_ids, linear_state=linear_state, **options)

    return op


KERNELS_TAKE = [size for size in SIZES if size[1] % 4 == size[2] % 4 == 0]


class TestMosaicGpu(RecurrenceContract):
    implementation = "mosaic_gpu"
    dtypes = ("float32", "bfloat16")
    saved_state_intervals = (32, 33, 1000)
    kept_every = MappingProxyType({16: 8, 64: 64, 128: 128})
    sizes = KERNELS_TAKE
    n_value = 8


class TestTheKernelsAlone(RecurrenceContract):
    """`e88_recurrence` computes single steps otherwise; the kernels take them all the same."""

    implementation = "kernels"
    dtypes = ("float32", "bfloat16")
    saved_state_intervals = (32, 33, 1000)
    kept_every = MappingProxyType({16: 8, 64: 64, 128: 128})
    n_value = 8
    sizes = KERNELS_TAKE

    def call(self, arrays: Tensors, *rows: Any, **options: Any) -> Any:
        return rows_by(by_kernels, arrays, *rows, **options)


@jax.jit
def _rounded_to_bfloat16(arrays: Any) -> Any:
    # XLA leaves out a conversion there and back.
    return jax.tree.map(lambda x: lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7), arrays)


def _results_and_gradients(
    op: Op, arrays: Tensors, ids: Any, cotangents: Any, linear_state: bool = False
) -> Tensors:
    @jax.jit
    def run(arrays: Tensors, cotangents: Any) -> Tensors:
        results, pullback = jax.vjp(
            lambda arrays: op(**arrays, segment_ids=ids, linear_state=linear_state), arrays
        )
        (d_arrays,) = pullback(cotangents)
        return dict(zip(("out", "final_state"), results, strict=True)) | {
            f"d_{name}": d for name, d in d_arrays.items()
        }

    return run(arrays, cotangents)


def check_against_scan(
    time: int,
    n_state: int,
    n_value: int,
    dtype: str,
    options: tuple[str, ...] = EVERY_OPTION,
    op: Op = MOSAIC_GPU,
    **rows: int,
) -> None:
    inputs = make_inputs(time, n_state, n_value, options, **rows)
    arrays, narrow = tensors(inputs, "float32"), ("q", "k", "v")
    d_out, d_state = (jnp.asarray(x, "float32") for x in make_cotangents(inputs))
    if dtype == "bfloat16":  # the same numbers to both
        arrays |= _rounded_to_bfloat16({name: arrays[name] for name in narrow})
        d_out = _rounded_to_bfloat16(d_out)
    ids = None if inputs.segment_ids is None else jnp.asarray(inputs.segment_ids)
    linear = inputs.linear_state
    expected = _results_and_gradients(SCAN, arrays, ids, (d_out, d_state), linear)
    arrays |= {name: arrays[name].astype(dtype) for name in narrow}
    cotangents = d_out.astype(dtype), d_state
    actual = _results_and_gradients(op, arrays, ids, cotangents, linear)
    ratios = {
        name: rms_ratio(np.float32(actual[name]), np.float32(x)) for name, x in expected.items()
    }
    assert all(ratio < BOUNDS[dtype] for ratio in ratios.values()), ratios


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES_OF_STATES)
def test_square_states(size: int, dtype: str) -> None:
    check_against_scan(67, size, size, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(16))
def test_other_states(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    n_state, n_value = (int(n) for n in rng.choice(SIZES_OF_STATES, 2))
    check_against_scan(50, n_state, n_value, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [83, 5, 1])
@pytest.mark.parametrize("time", [1, 31, 2049])
def test_odd_heads_and_times(time: int, heads: int, dtype: str) -> None:
    for size in (32, 48):
        check_against_scan(time, size, size, dtype, batch=2, heads=heads)
        options = "initial_state", "linear_state"
        check_against_scan(time, size, size, dtype, options, batch=2, heads=heads)


# (B, T, H, N, V), and the tuning config of the backward kernel.
CONFIGS = {
    "5 warpgroups, some idle": ((2, 131, 3, 32, 32), TuningConfig(1, 32, 16, 1, 5)),
    "parts, 5 warpgroups": ((2, 131, 4, 64, 64), TuningConfig(1, 32, 8, 1, 5)),
    "parts, 2 warpgroups": ((2, 131, 2, 128, 128), TuningConfig(1, 32, 8, 2, 2)),
    "2 heads": ((2, 131, 4, 48, 48), TuningConfig(2, 16, 16, 4, 4)),
    "2 heads, 2 n-tiles": ((2, 131, 4, 32, 32), TuningConfig(2, 32, 8, 8, 4)),
    "4 heads": ((2, 70, 6, 16, 8), TuningConfig(4, 8, 16, 2)),
    "2 n-tiles": ((2, 131, 2, 64, 64), TuningConfig(1, 64, 16, 2)),
    "chunks of 32": ((2, 99, 2, 32, 32), TuningConfig(2, 32, 32, 2)),
    "halved": ((2, 131, 4, 48, 48), TuningConfig(2, 16, 8, 4, 4, states_held=4)),
    "halved, 5 warpgroups": ((2, 131, 4, 64, 64), TuningConfig(1, 32, 8, 4, 5, states_held=3)),
    "halved, 128 keys": ((2, 131, 2, 128, 128), TuningConfig(1, 32, 8, 1, 2, states_held=4)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", ["bulk", "async"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tuning_configs(name: str, copies: Literal["bulk", "async"], dtype: str) -> None:
    (batch, time, heads, n_state, n_value), config = CONFIGS[name]
    config = dataclasses.replace(config, copies=copies)
    if dtype == "float32":  # twice the shared memory
        config = dataclasses.replace(config, warpgroups=1, chunk=8)
    # Without a write gate, which takes shared memory.
    kernels = kernels_alone(backward_config=config)
    check_against_scan(
        time, n_state, n_value, dtype, ("initial_state",), kernels, batch=batch, heads=heads
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [16, 24, 32])
def test_several_groups_in_a_chunk_of_the_forward_kernel(chunk: int, dtype: str) -> None:
    kernels = kernels_alone(forward_config=TuningConfig(1, 32, chunk))
    check_against_scan(75, 32, 32, dtype, op=kernels, batch=2, heads=3)


def test_forward_and_backward_that_pad_otherwise() -> None:
    check_against_scan(67, 128, 4, "float32", heads=5)


def test_more_than_65535_blocks() -> None:
    check_against_scan(5, 8, 8, "float32", batch=300, heads=900)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_of_a_full_gpu_are_bitwise_equal(dtype: str) -> None:
    inputs = make_inputs(300, 32, 32, EVERY_OPTION, batch=8, heads=72)
    d_out, d_state = make_cotangents(inputs)
    arguments = (
        tensors(inputs, dtype),
        jnp.asarray(inputs.segment_ids),
        (jnp.asarray(d_out, dtype), jnp.asarray(d_state, "float32")),
    )
    first, second = (_results_and_gradients(MOSAIC_GPU, *arguments) for _ in range(2))
    for name, x in first.items():
        assert np.asarray(x).tobytes() == np.asarray(second[name]).tobytes(), name


def test_more_than_2_31_elements() -> None:
    """The last row of the batch, past 2**31 elements, is what it is on its own."""
    batch, time, heads, size = 129, 8192, 128, 16
    keys = jax.random.split(jax.random.key(0), 5)

    @jax.jit
    def draw() -> Any:
        def normal(key: Any) -> Any:
            return jax.random.normal(key, (batch, time, heads, size), jnp.bfloat16)

        q, k, v, d_out = (normal(key) for key in keys[:4])
        decay = jax.random.uniform(keys[4], (batch, time, heads), minval=0.9)
        scale = jnp.bfloat16(size**-0.5)
        return {"q": q * scale, "k": k * scale, "v": v, "decay": decay}, d_out

    arrays, d_out = draw()
    assert arrays["q"].size > 2**31
    d_state = jnp.ones((batch, heads, size, size))
    row = {name: x[-1:] for name, x in arrays.items()}
    alone = _results_and_gradients(MOSAIC_GPU, row, None, (d_out[-1:], d_state[-1:]))
    together = _results_and_gradients(MOSAIC_GPU, arrays, None, (d_out, d_state))
    for name, x in alone.items():
        assert rms_ratio(np.float32(together[name][-1:]), np.float32(x)) < BOUNDS["bfloat16"], name
