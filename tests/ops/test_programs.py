"""Transformations, meshes and exported programs of the linear recurrences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.ops.inputs import (
    GATED_DELTA_RULE,
    SSD,
    Call,
    Op,
    Size,
    Tensors,
    expected,
    make_call,
    quick_jit,
    results_and_gradients,
    tensors,
)
from tests.recurrence_calls import BOUNDS, assert_tensors_close

TIMES = {"scan": 6, "chunked": 66}

# Each op by each implementation. Where there is another parameter, one half comes with some of its
# values and the other half with the rest: any value meets both ops and both implementations.
HALVES = (
    [(GATED_DELTA_RULE, "chunked"), (SSD, "scan")],
    [(GATED_DELTA_RULE, "scan"), (SSD, "chunked")],
)
ALL = [*HALVES[0], *HALVES[1]]

each = pytest.mark.parametrize(("op", "implementation"), ALL, ids=str)


def make(op: Op, implementation: str, dtype: str = "float32", **sizes: int) -> tuple[Call, Any]:
    """A call, and the arguments of `results_and_gradients` after the implementation."""
    size = Size(4, TIMES[implementation], 2, 4, 5, 7)._replace(**sizes)
    call = make_call(op, size)
    rows = jnp.asarray(call.segment_ids), jnp.asarray(call.lengths)
    cotangents = tuple(jnp.asarray(x, dtype) for x in call.cotangents)
    return call, (tensors(op, call, dtype), *rows, cotangents)


@each
def test_vmap(op: Op, implementation: str) -> None:
    """Over pairs of rows, with what is not per row the same for all."""
    call, arguments = make(op, implementation)
    run = functools.partial(results_and_gradients, op, implementation)
    axes = jax.tree.map(lambda _: 0, arguments)
    for name, x in call.arrays.items():
        if x.ndim == 1:
            axes[0][name] = None
    pairs = jax.tree.map(
        lambda x, axis: x if axis is None else np.asarray(x).reshape(2, 2, *x.shape[1:]),
        arguments,
        axes,
        is_leaf=lambda x: x is None,
    )
    mapped = quick_jit(jax.vmap(run, in_axes=axes))(*pairs)
    wanted = expected(op, call)
    actual = {
        name: np.sum(x, axis=0) if wanted[name].ndim == 1 else x.reshape(wanted[name].shape)
        for name, x in mapped.items()
    }
    assert_tensors_close(actual, wanted, BOUNDS["float32"])


# Meshes.


def spec(name: str, parts: dict[str, Any]) -> P:
    axes = {"initial_state": "bh", "segment_ids": "bt", "lengths": "b", "a": "h"}.get(name, "bth")
    return P(*(parts.get(axis) for axis in axes))


def specs_of(call: Call, parts: dict[str, Any]) -> Any:
    """Of the arguments of `results_and_gradients`."""
    arrays = {name: spec(name, parts) for name in call.arrays}
    results = {axis: part for axis, part in parts.items() if axis != "t"}  # time is gathered
    cotangents = spec("out", results), spec("initial_state", results)
    return arrays, spec("segment_ids", parts), spec("lengths", parts), cotangents


def collectives(compiled: Any) -> set[str]:
    text = str(compiled.as_text())
    assert "ENTRY" in text  # it is the program's text
    return {
        x for x in ("all-gather", "all-to-all", "all-reduce", "collective-permute") if x in text
    }


ROWS_AND_HEADS = {"b": "x", "h": "y"}


@pytest.mark.parametrize(
    ("op", "implementation", "kind", "parts"),
    [
        *((*half, AxisType.Explicit, ROWS_AND_HEADS) for half in HALVES[0]),
        *((*half, AxisType.Explicit, {"b": "x", "t": "y"}) for half in HALVES[1]),
        *((*half, AxisType.Auto, ROWS_AND_HEADS) for half in HALVES[1]),
    ],
    ids=str,
)
def test_sharded(op: Op, implementation: str, parts: dict[str, Any], kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    call, arguments = make(op, implementation)
    arguments = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        arguments,
        specs_of(call, parts),
    )
    shardings = None
    if kind == AxisType.Auto:
        wanted = {"out": spec("out", parts), "final_state": spec("initial_state", parts)}
        wanted |= {f"d_{name}": spec(name, parts) for name in call.arrays}
        shardings = {name: NamedSharding(mesh, x) for name, x in wanted.items()}
    run = functools.partial(results_and_gradients, op, implementation)
    compiled = quick_jit(run, out_shardings=shardings).lower(*arguments).compile()
    if "t" not in parts:  # only a sum over rows moves: of the gradient of a
        assert collectives(compiled) <= ({"all-reduce"} if "a" in call.arrays else set())
    results = compiled(*arguments)
    assert_tensors_close(results, expected(op, call), BOUNDS["float32"])
    if kind == AxisType.Explicit:
        for name, x in call.arrays.items():
            assert jax.typeof(results[f"d_{name}"]) == jax.typeof(arguments[0][name]), (name, x)
        heads = parts.get("h")
        assert jax.typeof(results["out"]).sharding.spec == P("x", None, heads, None)
        assert jax.typeof(results["final_state"]).sharding.spec == P("x", heads, None, None)


@pytest.mark.parametrize(("op", "implementation"), HALVES[0], ids=str)
def test_a_key_of_all_heads_is_not_sharded(op: Op, implementation: str) -> None:
    """Heads over devices, and one q and k for all of them on every device."""
    mesh = jax.make_mesh((4,), ("y",))
    call, arguments = make(op, implementation, groups=1)
    shared = [op.roles["q"], op.roles["k"]]
    specs = specs_of(call, {"h": "y"})
    specs[0].update(dict.fromkeys(shared, P()))
    arguments = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arguments, specs
    )
    results = quick_jit(functools.partial(results_and_gradients, op, implementation))(*arguments)
    assert_tensors_close(results, expected(op, call), BOUNDS["float32"])
    assert jax.typeof(results["out"]).sharding.spec == P(None, None, "y", None)


@pytest.mark.parametrize(
    ("op", "implementation", "check_vma"),
    [*((*x, True) for x in HALVES[0]), *((*x, False) for x in HALVES[1])],
    ids=str,
)
def test_inside_shard_map(op: Op, implementation: str, check_vma: bool) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    call, (arrays, ids, lengths, cotangents) = make(op, implementation)

    def run(arrays: Tensors, ids: Any, lengths: Any) -> Any:
        rows = {"segment_ids": ids, "lengths": lengths}
        return op.function(**arrays, **rows, implementation=implementation)

    of_arrays, *of_rows, of_results = specs_of(call, ROWS_AND_HEADS)
    mapped: Callable[..., Any] = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(of_arrays, *of_rows),
        out_specs=of_results,
        check_vma=check_vma,
    )

    @quick_jit
    def gradient(arrays: Tensors) -> Tensors:
        (out, state), pullback = jax.vjp(lambda arrays: mapped(arrays, ids, lengths), arrays)
        (grads,) = pullback(cotangents)
        return {"out": out, "final_state": state} | {f"d_{name}": x for name, x in grads.items()}

    assert_tensors_close(gradient(arrays), expected(op, call), BOUNDS["float32"])


# Programs for any batch and any length.


def exported(op: Op, shape: str, implementation: Any) -> Any:
    """Results and gradients of a call without an initial state."""
    call, _ = make(op, "scan")
    batch, time = export.symbolic_shape(shape)
    arrays = {
        name: jax.ShapeDtypeStruct(
            x.shape if x.ndim == 1 else (batch, time, *x.shape[2:]), "float32"
        )
        for name, x in call.without("initial_state").arrays.items()
    }
    rows = jax.ShapeDtypeStruct((batch, time), "int32"), jax.ShapeDtypeStruct((batch,), "int32")
    out = jax.ShapeDtypeStruct((batch, time, *call.cotangents[0].shape[2:]), "float32")
    state = jax.ShapeDtypeStruct((batch, *call.cotangents[1].shape[1:]), "float32")
    run = quick_jit(functools.partial(results_and_gradients, op, implementation))
    return export.export(run)(arrays, *rows, (out, state))


@each
def test_export(op: Op, implementation: str) -> None:
    """Of any batch by both; of any number of steps by the scan, which None chooses there."""
    time = TIMES[implementation]
    shape, named = ("b, t", None) if implementation == "scan" else (f"b, {time}", "chunked")
    program = exported(op, shape, named)
    steps = time if implementation == "chunked" else 4
    call, arguments = make(op, implementation, batch=3, time=steps)
    without = call.without("initial_state")
    arguments = tensors(op, without, "float32"), *arguments[1:]
    assert_tensors_close(program.call(*arguments), expected(op, without), BOUNDS["float32"])
    if implementation == "chunked":
        with pytest.raises(NotImplementedError, match=r"'chunked'.*symbolic.*'scan'"):
            exported(op, "b, t", "chunked")


# Other derivatives: products with the Hessian against differences of the loop's gradients.


# Forward over reverse has the forward derivative in it.
@pytest.mark.parametrize(
    ("op", "implementation", "mode"),
    [
        *((*x, "forward over reverse") for x in HALVES[0]),
        *((*x, mode) for x in HALVES[1] for mode in ("forward", "reverse over reverse")),
    ],
    ids=str,
)
def test_derivatives(op: Op, implementation: str, mode: str, x64: None) -> None:
    sizes = {"batch": 1, "groups": 1, "heads": 2, "n_key": 3, "n_value": 2}
    sizes |= {"time": 3} if implementation == "scan" else {}
    call, (arrays, ids, lengths, cotangents) = make(op, implementation, "float64", **sizes)
    rng, small = np.random.default_rng(0), 1e-5
    directions = {name: rng.normal(size=x.shape) for name, x in call.arrays.items()}
    ahead, behind = (
        expected(
            op,
            call.changed(
                **{name: x + sign * small * directions[name] for name, x in call.arrays.items()}
            ),
        )
        for sign in (1, -1)
    )
    slopes = {name: (x - behind[name]) / (2 * small) for name, x in ahead.items()}

    def run(arrays: Tensors) -> Any:
        rows = {"segment_ids": ids, "lengths": lengths}
        return op.function(**arrays, **rows, implementation=implementation)

    def loss(arrays: Tensors) -> Any:
        return sum(jnp.sum(x * d) for x, d in zip(run(arrays), cotangents, strict=True))

    gradient = jax.grad(loss)

    @quick_jit
    def derivative(arrays: Tensors, directions: Tensors) -> Tensors:
        if mode == "forward":
            _, tangents = jax.jvp(run, (arrays,), (directions,))
            return dict(zip(("out", "final_state"), tangents, strict=True))
        if mode == "forward over reverse":
            _, product = jax.jvp(gradient, (arrays,), (directions,))
        else:
            product = jax.grad(
                lambda arrays: sum(
                    jnp.vdot(x, directions[name]) for name, x in gradient(arrays).items()
                )
            )(arrays)
        return {f"d_{name}": x for name, x in product.items()}

    actual = derivative(arrays, directions)
    assert_tensors_close(actual, {name: slopes[name] for name in actual}, 1e-7)


@each
def test_the_default_on_a_cpu(op: Op, implementation: str) -> None:
    """The chunk form where there is more than one step."""
    _, (arrays, *_) = make(op, implementation, time=1 if implementation == "scan" else 2)
    by_default, named = (
        jax.jit(functools.partial(op.function, implementation=x)).lower(**arrays).as_text()
        for x in (None, implementation)
    )
    assert by_default == named
