"""The op around the kernels, with their functions in plain JAX in their place."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from e88_jax.documents import document_starts
from e88_jax.naive import rms_ratio
from pallas_kernels.recurrence import TuningConfig, calls, op, recurrence
from tests.recurrence_calls import EVERY_OPTION, Tensors, make_inputs, rows_by, tensors
from tests.recurrence_contract import RecurrenceContract
from tests.reference import recurrence_kernels_in_jax

call = functools.partial(rows_by, recurrence)


@pytest.fixture(autouse=True)
def kernels_in_plain_jax(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "forward", recurrence_kernels_in_jax.forward)
    monkeypatch.setattr(calls, "backward", recurrence_kernels_in_jax.backward)
    # In plain JAX they take every size.
    monkeypatch.setattr(op, "_require_supported", lambda q, v: None)
    _forget_traced_calls()
    yield
    _forget_traced_calls()


def _forget_traced_calls() -> None:
    calls.forward_call.cache_clear()
    calls.backward_call.cache_clear()


class TestAroundTheKernels(RecurrenceContract):
    implementation = "kernels in plain JAX"
    dtypes = ("float32", "bfloat16")
    saved_state_intervals = (32, 33, 1000)
    kept_every = MappingProxyType({16: 8, 64: 64, 128: 128})
    quick_to_compile = dtypes

    def call(self, arrays: Tensors, *rows: Any, **options: Any) -> Any:
        return call(arrays, *rows, **options)

    def test_heads_may_be_sharded_too(self) -> None:
        arrays = tensors(make_inputs(9, 4, 6, EVERY_OPTION, batch=2, heads=4), "float32")
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

        def sharding(name: str, x: jax.Array) -> NamedSharding:
            axes = {"b": "data", "h": "model"}
            names = "b h n v" if name == "initial_state" else "b t h n"
            return NamedSharding(
                mesh, PartitionSpec(*(axes.get(n) for n in names.split()[: x.ndim]))
            )

        def gradient(arrays: Tensors) -> Any:
            results, pullback = jax.vjp(call, arrays)
            return results, pullback(results)

        sharded = {name: jax.device_put(x, sharding(name, x)) for name, x in arrays.items()}
        compiled = jax.jit(gradient).lower(sharded).compile()
        for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
            assert collective not in str(compiled.as_text())
        actual, expected = compiled(sharded), jax.jit(gradient)(arrays)
        assert actual[0][0].sharding.spec == PartitionSpec("data", None, "model")
        # XLA's older code for a CPU sums shards otherwise.
        ratios = jax.tree.map(rms_ratio, actual, expected)
        assert all(ratio < 1e-6 for ratio in jax.tree.leaves(ratios)), ratios


@pytest.mark.parametrize(
    ("saved_state_interval", "n_saved", "values"),
    [
        # A state before each 8 steps, and delta in place of v, padded.
        (32, 13, ((2, 100, 3, 16), "float32")),
        # As asked for, and v itself, to recompute the others from.
        (40, 2, ((2, 100, 3, 12), "bfloat16")),
    ],
)
def test_what_is_saved_for_the_backward_pass(
    saved_state_interval: int, n_saved: int, values: tuple[tuple[int, ...], str]
) -> None:
    inputs = make_inputs(100, 4, 12, EVERY_OPTION, batch=2, heads=3)
    arrays = tensors(inputs, "bfloat16")
    ids = jnp.asarray(inputs.segment_ids)
    starts = document_starts(ids)

    def saved(op: Callable[[Tensors], Any]) -> Counter[str]:
        kept = jax.eval_shape(lambda arrays: jax.vjp(op, arrays)[1], arrays)
        return Counter(map(str, jax.tree.leaves(kept)))

    options: Any = {"linear_state": False, "saved_state_interval": saved_state_interval}
    wanted = arrays | {
        "v": jnp.zeros(*values),
        "starts": starts,
        "saved_states": jnp.zeros((2, 3, n_saved, 16, 16), "bfloat16"),  # padded
    }
    by_kernels = saved(lambda arrays: recurrence(**arrays, starts=starts, **options))
    assert by_kernels == Counter(str(jax.eval_shape(lambda x=x: x)) for x in wanted.values())
    # What keeps documents apart saves no more than a bool of each step and head.
    others = saved(lambda arrays: call(arrays, ids, **options)) - by_kernels
    shapes = {str(jax.ShapeDtypeStruct(shape, bool)) for shape in ((2, 100, 3), (2, 3))}
    assert set(others) == shapes, others


def test_nothing_is_saved_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals = []

    def forward(*args: Any, **options: Any) -> Any:
        intervals.append(args[3])
        return recurrence_kernels_in_jax.forward(*args, **options)

    monkeypatch.setattr(calls, "forward", forward)
    jax.eval_shape(call, tensors(make_inputs(5, 4, 8), "float32"))
    assert set(intervals) == {None}


@pytest.mark.parametrize(
    ("time", "saved_state_interval"),
    # Whole segments and steps left over, whole ones only, one short one.
    [(211, 96), (192, 64), (100, 500)],
)
def test_saved_states_far_apart(time: int, saved_state_interval: int) -> None:
    inputs = make_inputs(time, 4, 8, EVERY_OPTION, batch=2, heads=1)
    TestAroundTheKernels().check_against_numpy(
        inputs, "float32", saved_state_interval=saved_state_interval
    )


@pytest.mark.parametrize(
    ("forward", "backward", "saved_state_interval"),
    [
        (
            TuningConfig(heads=4, values=16, chunk=24),
            TuningConfig(heads=2, values=16, chunk=40),
            32,
        ),
        # Each of the two pads heads and columns otherwise.
        (TuningConfig(heads=4, values=8, chunk=24), TuningConfig(heads=1, values=64, chunk=40), 32),
        (TuningConfig(heads=4, values=8, chunk=24), TuningConfig(heads=1, values=64, chunk=40), 64),
        (TuningConfig(heads=1, values=64, chunk=40), TuningConfig(heads=4, values=8, chunk=24), 64),
    ],
)
def test_configs_may_be_given(
    forward: TuningConfig, backward: TuningConfig, saved_state_interval: int
) -> None:
    inputs = make_inputs(75, 4, 6, EVERY_OPTION, batch=1, heads=3)
    TestAroundTheKernels().check_against_numpy(
        inputs,
        "float32",
        forward_config=forward,
        backward_config=backward,
        saved_state_interval=saved_state_interval,
    )


def test_higher_derivatives_are_refused() -> None:
    arrays = tensors(make_inputs(5, 4, 8), "float32")

    def slope(v: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(lambda v: jnp.sum(call(arrays | {"v": v})[0]))(v))

    with pytest.raises(NotImplementedError, match="implementation='scan'"):
        jax.grad(slope)(arrays["v"])


@pytest.mark.parametrize("saved_state_interval", [32, 33])
def test_delta_is_stored_only_where_it_is_read(
    saved_state_interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 32 steps; farther apart, a forward pass over each segment stores its own."""
    stored: list[bool] = []

    def forward(*arguments: Any, **options: Any) -> Any:
        *_, saved = results = recurrence_kernels_in_jax.forward(*arguments, **options)
        assert saved is not None
        stored.append(saved.delta is not None)
        return results

    monkeypatch.setattr(calls, "forward", forward)
    arrays = tensors(make_inputs(100, 4, 8, (), batch=1, heads=2), "float32")

    def run(arrays: Tensors) -> Any:
        return call(arrays, saved_state_interval=saved_state_interval)

    jax.eval_shape(lambda arrays: jax.vjp(run, arrays)[1], arrays)
    assert set(stored) == {saved_state_interval <= 32}
