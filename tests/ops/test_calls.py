"""Arguments of the linear recurrences, refusals of them, and the choice of an implementation."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax import e88_recurrence, kernels
from e88_jax.ops import gated_delta_rule, hopper
from e88_jax.ops.sequential import sequential
from pallas_kernels import target
from tests.ops.inputs import (
    GATED_DELTA_RULE,
    OPS,
    OPTIONS,
    SSD,
    Op,
    Size,
    evaluate,
    expected,
    make_call,
    quick_jit,
    results_and_gradients,
    tensors,
)
from tests.recurrence_calls import BOUNDS, assert_tensors_close
from tests.reference.odd import NOT_ARRAYS, NOT_CHOICES, OP, fault_of, without

SMALL = Size(2, 5, 3, 6, 4, 7)
TOO_LARGE = SMALL._replace(n_value=132)
"""For E88's kernels, which run the delta rule too: they take V up to 128."""


def arguments_of(op: Op, dtype: str = "float32", size: Size = SMALL) -> dict[str, Any]:
    call = make_call(op, size)
    return {**tensors(op, call, dtype), "segment_ids": call.segment_ids, "lengths": call.lengths}


def zeros(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


# What is wrong, by roles, and every number that the message must hold.
WRONG: dict[str, tuple[str, Any, list[str]]] = {
    "q of rank 3": ("q", zeros(2, 5, 12), ["(2, 5, 12)"]),
    "v of rank 3": ("v", zeros(2, 5, 42), ["(2, 5, 42)"]),
    "no time": ("q", zeros(2, 0, 3, 4), ["(2, 0, 3, 4)"]),
    "no value": ("v", zeros(2, 5, 6, 0), ["(2, 5, 6, 0)"]),
    "k of another K": ("k", zeros(2, 5, 3, 8), ["(2, 5, 3, 4)", "(2, 5, 3, 8)"]),
    "k of another G": ("k", zeros(2, 5, 6, 4), ["(2, 5, 3, 4)", "(2, 5, 6, 4)"]),
    "v of another B": ("v", zeros(1, 5, 6, 7), ["(2, 5, 6, 7)", "(1, 5, 6, 7)"]),
    "v of another T": ("v", zeros(2, 6, 6, 7), ["(2, 5, 6, 7)", "(2, 6, 6, 7)"]),
    "H no multiple of G": ("v", zeros(2, 5, 7, 7), ["multiple", "3", "7"]),
    "fewer heads than G": ("v", zeros(2, 5, 1, 7), ["multiple", "3", "1"]),
    "a gate per value": ("gate", zeros(2, 5, 6, 7), ["(2, 5, 6)", "(2, 5, 6, 7)"]),
    "a gate of another H": ("gate", zeros(2, 5, 3), ["(2, 5, 6)", "(2, 5, 3)"]),
    "a decay of another T": ("decay", zeros(2, 4, 6), ["(2, 5, 6)", "(2, 4, 6)"]),
    "a state transposed": ("initial_state", zeros(2, 6, 7, 4), ["(2, 6, 4, 7)", "(2, 6, 7, 4)"]),
    "a state of G heads": ("initial_state", zeros(2, 3, 4, 7), ["(2, 6, 4, 7)", "(2, 3, 4, 7)"]),
    "ids per head": ("segment_ids", zeros(2, 5, 6, dtype="int32"), ["(2, 5)", "(2, 5, 6)"]),
    "ids of floats": ("segment_ids", zeros(2, 5), ["float32"]),
    "lengths of floats": ("lengths", zeros(2), ["float32"]),
    "a length past the end": ("lengths", [5, 6], ["from 0 to 5", "6"]),
    "q of float16": ("q", zeros(2, 5, 3, 4, dtype="float16"), ["float16"]),
    "q of integers": ("q", zeros(2, 5, 3, 4, dtype="int32"), ["int32"]),
    "k of bfloat16": ("k", zeros(2, 5, 3, 4, dtype="bfloat16"), ["float32", "bfloat16"]),
    "v of bfloat16": ("v", zeros(2, 5, 6, 7, dtype="bfloat16"), ["float32", "bfloat16"]),
    "a decay of bfloat16": ("decay", zeros(2, 5, 6, dtype="bfloat16"), ["float32", "bfloat16"]),
    "a gate of bfloat16": ("gate", zeros(2, 5, 6, dtype="bfloat16"), ["float32", "bfloat16"]),
    "a state of bfloat16": (
        "initial_state",
        zeros(2, 6, 4, 7, dtype="bfloat16"),
        ["float32", "bfloat16"],
    ),
    "unknown implementation": ("implementation", "cuda", ["scan", "chunked", "cuda"]),
}


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_bad_calls(op: Op, case: str) -> None:
    role, value, fragments = WRONG[case]
    name = op.roles.get(role, role)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (fragments below)
        op.function(**arguments_of(op) | {name: value})
    for fragment in (name, *fragments):
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("a", "fragments"),
    [
        (zeros(3), ["(6,)", "(3,)"]),
        (zeros(2, 6), ["(6,)", "(2, 6)"]),
        (zeros(6, dtype="bfloat16"), ["float32", "bfloat16"]),
        (zeros(6, dtype="int32"), ["float32", "int32"]),
    ],
)
def test_bad_rates(a: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match="a must") as error:
        SSD.function(**arguments_of(SSD) | {"a": a})
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_an_odd_argument_is_named(op: Op) -> None:
    good = arguments_of(op)
    odd = {x: without(NOT_ARRAYS, "None") if x in OPTIONS else NOT_ARRAYS for x in good}
    faults = {
        (name, what): fault
        for name, values in (odd | {"implementation": NOT_CHOICES}).items()
        for what, value in values.items()
        if (fault := fault_of(name, op.function, **{**good, name: value}))
    }
    assert faults == {}


@pytest.mark.parametrize("op", OPS, ids=str)
def test_numpy_arrays_and_lists_are_arrays(op: Op) -> None:
    """Without `jax.jit`, too: by programs of single operations, as the fallbacks below."""
    call = make_call(op, TOO_LARGE)
    wanted = expected(op, call)
    arguments = {name: np.asarray(x) for name, x in arguments_of(op, size=TOO_LARGE).items()}
    for convert in (np.asarray, np.ndarray.tolist):
        out, state = op.function(**{name: convert(x) for name, x in arguments.items()})
        of_loop = {name: wanted[name] for name in ("out", "final_state")}
        assert_tensors_close({"out": out, "final_state": state}, of_loop, BOUNDS["float32"])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_float64_takes_float32_gates(op: Op, x64: None) -> None:
    arguments = arguments_of(op, "float64")
    run = quick_jit(op.function)
    wide = run(**arguments)
    narrow = [op.roles["gate"], op.roles["decay"], "initial_state"]
    mixed = run(**arguments | {x: arguments[x].astype("float32") for x in narrow})
    for x, y in zip(mixed, wide, strict=True):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# The choice of an implementation.


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_kernels_refuse_a_cpu(op: Op) -> None:
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' needs an NVIDIA GPU.*'chunked'"):
        op.function(**arguments_of(op), implementation="mosaic_gpu")


def test_the_e88_recurrence_has_no_chunk_form() -> None:
    with pytest.raises(NotImplementedError, match=r"'chunked'.*e88_recurrence.*'scan'"):
        e88_recurrence(**OP, implementation="chunked")


def test_bad_input_is_named_before_the_implementation_refuses() -> None:
    with pytest.raises(ValueError, match="log_decay must"):
        gated_delta_rule(
            **arguments_of(GATED_DELTA_RULE) | {"log_decay": zeros(2, 5)},
            implementation="mosaic_gpu",
        )


@pytest.mark.parametrize("op", OPS, ids=str)
class TestOnAGpu:
    """Programs are built for an H100."""

    @pytest.fixture(autouse=True)
    def an_h100(self) -> Iterator[None]:
        self.forget()
        with target.use(target.H100):
            yield
        self.forget()

    def forget(self) -> None:
        for asked in (kernels._import_refusal, kernels._lowering_refusal, kernels.log_once):
            asked.cache_clear()

    def check_falls_back(
        self, op: Op, dtype: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """To the chunk form, with the reason said once; refused by name for the same reason."""
        arguments = arguments_of(op, dtype, TOO_LARGE)
        by_chunks = op.function(**arguments, implementation="chunked")
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                for x, y in zip(op.function(**arguments), by_chunks, strict=True):
                    np.testing.assert_array_equal(x, y)
        (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("e88_jax")]
        assert message.startswith(f"{op} falls back to 'chunked': implementation='mosaic_gpu'")
        assert reason in message
        with pytest.raises(NotImplementedError) as refused:
            op.function(**arguments, implementation="mosaic_gpu")
        assert reason in str(refused.value)

    def test_without_the_package(
        self, op: Op, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(hopper, "PACKAGE", "a_package_that_is_missing")
        self.check_falls_back(op, "bfloat16", "needs jax-linear-attention", caplog)

    def test_of_float32(
        self, op: Op, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(hopper, "PACKAGE", "json")  # one that is installed
        self.check_falls_back(op, "float32", "takes bfloat16, got float32", caplog)

    def test_a_kernel_that_refuses(
        self, op: Op, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def kernel(module: str, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> Any:
                raise ValueError("takes K of 64, got 4")

            return refuse

        monkeypatch.setattr(hopper, "PACKAGE", "json")
        monkeypatch.setattr(hopper, "_kernel", kernel)
        self.check_falls_back(op, "bfloat16", "takes K of 64, got 4", caplog)

    def test_one_step_is_the_scan_s(self, op: Op, caplog: pytest.LogCaptureFixture) -> None:
        arrays = tensors(op, make_call(op, SMALL._replace(time=1)), "bfloat16")
        default, scan = op.function(**arrays), op.function(**arrays, implementation="scan")
        for x, y in zip(default, scan, strict=True):
            np.testing.assert_array_equal(x, y)
        assert not caplog.records

    @pytest.mark.parametrize("left_out", [(), OPTIONS], ids=str)
    def test_what_the_kernels_are_given(
        self, op: Op, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In place of the kernels the scan, by their arguments."""
        calls: list[tuple[str, str]] = []

        def run(q: Any, k: Any, v: Any, g: Any, beta: Any, **given: Any) -> Any:
            delta = given.pop("delta", True)
            assert given.pop("grouped_key_grads", True)
            assert (given.pop("scale"), given.pop("output_final_state")) == (1, True)
            initial_state, ids = given.pop("initial_state"), given.pop("segment_ids")
            assert not given
            starts = None
            if ids is not None:
                assert ids.dtype == jnp.int32
                starts = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
            beta = jnp.ones_like(g) if beta is None else beta
            return sequential(q, k, v, g, beta, initial_state, starts, delta_rule=delta)

        def kernel(module: str, name: str) -> Any:
            calls.append((module, name))
            return (lambda *_, **__: None) if name == "unsupported_reason" else run

        monkeypatch.setattr(hopper, "PACKAGE", "json")
        monkeypatch.setattr(hopper, "_kernel", kernel)
        call = make_call(op, SMALL).without(*left_out)
        d_out, d_state = call.cotangents
        arguments = (
            tensors(op, call, "bfloat16"),
            call.segment_ids,
            call.lengths,
            (jnp.asarray(d_out, "bfloat16"), jnp.asarray(d_state, "float32")),
        )
        by_kernels = functools.partial(results_and_gradients, op, "mosaic_gpu")
        actual = quick_jit(by_kernels)(*arguments)
        of_ssd = [("scalar_gate", "unsupported_reason"), ("scalar_gate", "run")]
        assert set(calls) == set(of_ssd if op is SSD else [("gated_delta_rule",) * 2])
        with target.use(target.CPU):
            by_scan = evaluate(op, "scan", call, "bfloat16")
        # The write of ssd is rounded once more.
        bound = BOUNDS["bfloat16"] * (2 if op is SSD else 1)
        actual = {name: np.asarray(x) for name, x in actual.items()}
        assert_tensors_close(actual, by_scan, bound)
