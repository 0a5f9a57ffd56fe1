"""What JAX raises where it does not take the kernels: a refusal, which is reason to do without."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from e88_jax import kernels, recurrence
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.recurrence import e88_recurrence
from e88_jax.reference import scan_recurrence
from pallas_kernels import decode, qkv_activation, target
from pallas_kernels.decode import op as decode_op
from pallas_kernels.qkv_activation import lanes as activation_lanes
from pallas_kernels.recurrence import backward_kernel, forward_kernel, forward_step
from pallas_kernels.recurrence import recurrence as by_kernels
from tests.recurrence_calls import make_inputs, tensors
from tests.reference.configs import e88_layer

VALUE_ERROR = ValueError("Out of bound slice: start=0.\nThe kernel's frames.")
ATTRIBUTE_ERROR = AttributeError("module 'mosaic_gpu' has no attribute 'CompilerParams'")


@pytest.fixture(autouse=True)
def an_h100() -> Iterator[None]:
    """Programs are built for one, and nothing has been asked of JAX yet."""
    _forget()
    with target.use(target.H100):
        yield
    _forget()


def _forget() -> None:
    for asked in (kernels._import_refusal, kernels._lowering_refusal, kernels.log_once):
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
    cause = refused.value.__cause__
    assert cause is not None
    assert cause.__cause__ is error


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
    with pytest.raises(NotImplementedError, match="cannot be imported with JAX") as refused:
        kernels.require(None)
    assert isinstance(refused.value.__cause__, ImportError)
    check_falls_back(caplog, refused.value.__cause__)


def test_where_kernels_are_not_asked_for_or_do_not_run() -> None:
    """No reason to warn."""
    kernels.require(None)
    kernels.require("mosaic_gpu")
    with pytest.raises(kernels.NotWorthIt, match="not asked for"):
        kernels.require("scan")
    with target.use(target.CPU), pytest.raises(kernels.NotWorthIt, match="got platform 'cpu'"):
        kernels.require("mosaic_gpu")


def refusal_of(function: Any, *arguments: Any, **options: Any) -> NotImplementedError | None:
    """What `kernels.call` raises before it calls the function, which is only traced here."""
    try:
        jax.eval_shape(lambda: kernels.call(function, *arguments, **options))
    except NotImplementedError as refusal:
        return refusal
    return None


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
        with pytest.raises(NotImplementedError) as refused:
            kernels.call(qkv_activation.activate, columns, y)
        refusals.append(refused.value)
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
    assert refusal.__cause__ is VALUE_ERROR


def test_kernels_that_lower_are_not_refused() -> None:
    arrays = tensors(make_inputs(100, 12, 20, ("write_gate",), batch=1, heads=3), "float32")
    options = {"starts": jnp.zeros((1, 100), bool), "initial_state": None}
    options |= {"linear_state": False, "saved_state_interval": 32}
    assert refusal_of(by_kernels, **arrays, **options) is None
    columns = qkv_activation.HeadColumns(3, 16, 16, True, True)
    y = jnp.ones((2, 5, columns.n_columns + 48))
    assert refusal_of(qkv_activation.activate, columns, y) is None
    layer = decode.DecodeConfig(columns, "silu", columns.n_columns, False)
    token = layer, y[:, 0], jnp.ones((2, 3)), None, jnp.ones((2, 3, 16, 16))
    assert refusal_of(decode.decode_layer, *token, gradient=False) is None
    # A token's kernel has no gradient, which would be seen only later.
    assert refusal_of(decode.decode_layer, *token) is not None


def test_sizes_that_a_kernel_does_not_take_are_refused_by_its_own_words() -> None:
    columns = qkv_activation.HeadColumns(3, 6, 6, True, True)
    refusal = refusal_of(qkv_activation.activate, columns, jnp.ones((2, 5, columns.n_columns)))
    assert str(refusal) == "takes N a multiple of 4, got 6"


@pytest.mark.parametrize("time", [7, 1])
def test_a_layer_whose_kernels_cannot_be_lowered(
    time: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "mosaic_gpu", scan_recurrence)
    for module, name in ((activation_lanes, "activate_rows"), (decode_op, "token_of_row")):
        monkeypatch.setattr(module, name, raising(VALUE_ERROR))
    x = jnp.ones((1, time, 8))
    results = []
    for implementation in (None, "scan"):
        layer = e88_layer(dim=8, n_heads=2, dtype="float32", implementation=implementation)
        mixer = E88Mixer(*layer, rngs=nnx.Rngs(0))
        if time == 1:
            mixer = mixer.for_inference()
        results.append([mixer(x) for _ in range(2)][1][0])
    np.testing.assert_array_equal(*results)
    (record,) = caplog.records
    assert "XLA computes" in record.getMessage()
    assert "Out of bound slice: start=0." in record.getMessage()
