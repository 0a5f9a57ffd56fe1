"""What JAX raises where it does not take the kernels: a refusal, which is reason to do without."""

import dataclasses
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e88_jax.mixer import E88Mixer
from flax import nnx

import pallas_kernels
from e88_jax import kernels, recurrence
from e88_jax.config import E88Config
from e88_jax.recurrence import e88_recurrence
from pallas_kernels import decode, qkv_activation
from pallas_kernels.decode import op as decode_op
from pallas_kernels.qkv_activation import lanes as activation_lanes
from pallas_kernels.recurrence import backward_kernel, forward_kernel, forward_step
from pallas_kernels.recurrence import recurrence as by_kernels
from tests.recurrence_contract import make_inputs, tensors

VALUE_ERROR = ValueError("Out of bound slice: start=0.\nThe kernel's frames.")
ATTRIBUTE_ERROR = AttributeError("module 'mosaic_gpu' has no attribute 'CompilerParams'")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has one, and has asked nothing yet."""
    monkeypatch.setattr(recurrence, "unsupported_device", lambda: None)
    monkeypatch.setattr(recurrence, "_fastest_first", lambda: ("mosaic_gpu", "scan"))
    _forget()
    yield
    _forget()


def _forget() -> None:
    for asked in (kernels.import_refusal, kernels._lowering_refusal, recurrence.log_once):
        asked.cache_clear()


def raising(error: Exception) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


ARRAYS = tensors(make_inputs(5, 4, 8, batch=1, heads=1), "float32")


def check_falls_back(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """With the reason said once; a call of the kernels by name is refused for the same reason."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]})"
    expected = e88_recurrence(**ARRAYS, implementation="scan")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(e88_recurrence(**ARRAYS)[0], expected[0])
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("e88_jax")]
    assert reason in message
    assert f"JAX {jax.__version__}" in message
    assert str(error).splitlines()[-1] not in message.replace(reason, "")
    with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu' cannot") as refused:
        e88_recurrence(**ARRAYS, implementation="mosaic_gpu")
    assert reason in str(refused.value)
    assert refused.value.__cause__.__cause__ is error


# A kernel's start, what is inside of it, and the backward kernel, traced after the forward pass.
@pytest.mark.parametrize(
    ("module", "name"),
    [(forward_kernel, "run_blocks"), (forward_step, "update"), (backward_kernel, "run_blocks")],
    ids=["forward", "a step", "backward"],
)
@pytest.mark.parametrize("error", [VALUE_ERROR, ATTRIBUTE_ERROR], ids=["check", "name"])
def test_kernels_that_cannot_be_lowered(
    module: Any,
    name: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, name, raising(error))
    check_falls_back(caplog, error)


def test_kernels_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pallas_kernels.qkv_activation", None)
    monkeypatch.delattr(pallas_kernels, "qkv_activation")
    refusal = kernels.import_refusal()
    assert refusal is not None
    assert isinstance(refusal.__cause__, ImportError)
    check_falls_back(caplog, refusal.__cause__)


@pytest.mark.parametrize("under", ["jit", "mesh", "vmap", "shard_map"])
def test_a_refusal_is_seen_wherever_the_call_is(
    under: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a mesh, kernels are not lowered before XLA compiles."""
    monkeypatch.setattr(activation_lanes, "activate_rows", raising(VALUE_ERROR))
    columns = qkv_activation.HeadColumns(1, 4, 4, True, True)
    refusals = []

    def call(x: jax.Array) -> jax.Array:
        y = jnp.ones((1, 2, columns.n_columns))
        refusals.append(kernels.lowering_refusal(qkv_activation.activate, columns, y))
        return x

    rows = jax.sharding.PartitionSpec("rows")
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.ones(4)
    if under == "mesh":
        with jax.set_mesh(mesh):
            jax.jit(call)(x)
    elif under == "shard_map":
        jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows)(x)
    else:
        {"jit": jax.jit, "vmap": jax.vmap}[under](call)(x)
    (refusal,) = refusals
    assert refusal is not None
    assert refusal.__cause__ is VALUE_ERROR


def test_kernels_that_lower_are_not_refused() -> None:
    arrays = tensors(make_inputs(100, 12, 20, ("write_gate",), batch=1, heads=3), "float32")
    options = {"starts": jnp.zeros((1, 100), bool), "initial_state": None}
    options |= {"linear_state": False, "saved_state_interval": 32}
    assert kernels.lowering_refusal(by_kernels, **arrays, **options) is None
    columns = qkv_activation.HeadColumns(3, 16, 16, True, True)
    y = jnp.ones((2, 5, columns.n_columns + 48))
    assert kernels.lowering_refusal(qkv_activation.activate, columns, y) is None
    layer = decode.DecodeConfig(columns, "silu", columns.n_columns, False)
    token = layer, y[:, 0], jnp.ones((2, 3)), None, jnp.ones((2, 3, 16, 16))
    assert kernels.lowering_refusal(decode.decode_layer, *token, gradient=False) is None
    # A token's kernel has no gradient, which would be seen only later.
    assert kernels.lowering_refusal(decode.decode_layer, *token) is not None


@pytest.mark.parametrize("time", [7, 1])
def test_a_layer_whose_kernels_cannot_be_lowered(
    time: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recurrence, "_fastest_first", lambda: ("scan",))
    for module, name in ((activation_lanes, "activate_rows"), (decode_op, "token_of_row")):
        monkeypatch.setattr(module, name, raising(VALUE_ERROR))
    config = E88Config(dim=8, n_heads=2, n_state=4, dtype="float32")
    x = jnp.ones((1, time, 8))
    results = []
    for implementation in (None, "scan"):
        mixer = E88Mixer(
            dataclasses.replace(config, implementation=implementation), rngs=nnx.Rngs(0)
        )
        if time == 1:
            mixer.join_projections()
        results.append([mixer(x) for _ in range(2)][1][0])
    np.testing.assert_array_equal(*results)
    (record,) = caplog.records
    assert "XLA computes" in record.getMessage()
    assert "Out of bound slice: start=0." in record.getMessage()
