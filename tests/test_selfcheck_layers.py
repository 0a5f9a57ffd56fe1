"""The check of a layer's kernels: what it takes for right, and that it sees what is wrong."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.decode
import pallas_kernels.qkv_activation
from e88_jax import kernels, selfcheck, selfcheck_layers
from e88_jax.selfcheck_layers import LayerCase
from tests.reference.layer_by_xla import activated, decoded

SMALL = (
    LayerCase("activation", (2, 5, 3, 8, 16), "float32"),
    LayerCase("decode", (2, 1, 3, 8, 16), "float32", write_gate=True),
)
spoils: dict[str, Any] = {}
"""From a result's name to what is wrong with it."""


@pytest.fixture(autouse=True)
def kernels_by_xla(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def spoiled(**results: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(spoils.get(name, lambda x: x)(x) for name, x in results.items())

    def activate(columns: Any, y: jax.Array, n_rest: int) -> tuple[jax.Array, ...]:
        q, k, v, rest = activated(columns, n_rest, y)
        return *spoiled(q=q, k=k, v=v), rest

    def decode_layer(*arguments: Any) -> tuple[jax.Array, ...]:
        out, state = decoded(*arguments)
        return spoiled(out=out, state=state)

    monkeypatch.setattr(pallas_kernels.qkv_activation, "activate", activate)
    monkeypatch.setattr(pallas_kernels.decode, "decode_layer", decode_layer)
    monkeypatch.setattr(kernels, "require", lambda _: None)
    monkeypatch.setattr(
        kernels, "call", lambda function, *arguments, gradient=True: function(*arguments)
    )
    monkeypatch.setattr(selfcheck_layers, "FULL", SMALL)
    monkeypatch.setattr(selfcheck, "FULL", ())
    yield
    spoils.clear()


def failures() -> list[tuple[str, ...]]:
    results = selfcheck.run_checks(["mosaic_gpu"], report=lambda _: None)
    assert [result.case for result in results] == list(SMALL)
    return [result.failures for result in results]


def test_what_is_right_passes() -> None:
    assert failures() == [(), ()]


@pytest.mark.parametrize("dtype", selfcheck_layers.DTYPES)
@pytest.mark.parametrize("kernel", ["activation", "decode"])
def test_xla_is_within_the_bounds_of_every_dtype(
    kernel: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(x for x in FULL if (x.kernel, x.dtype, x.shape[2]) == (kernel, dtype, 72))
    monkeypatch.setattr(selfcheck_layers, "FULL", (case,))
    (result,) = selfcheck.run_checks(["mosaic_gpu"], report=lambda _: None)
    assert result.failures == ()
    assert result.ratio is not None
    assert result.ratio < selfcheck.BOUNDS[dtype]


FULL = selfcheck_layers.FULL


@pytest.mark.parametrize(
    ("name", "case", "of_result"),
    [("q", 0, "q"), ("k", 0, "k"), ("v", 0, "v"), ("out", 1, "out"), ("state", 1, "state")],
)
def test_a_wrong_result_is_found(name: str, case: int, of_result: str) -> None:
    spoils[name] = lambda x: x * 1.001
    found = failures()
    assert any(of_result in failure for failure in found[case])
    assert found[1 - case] == ()


def test_a_wrong_gradient_is_found() -> None:
    spoils["k"] = lambda x: x + 0.01 * (x - jax.lax.stop_gradient(x))
    assert [x.partition(" ")[0] for x in failures()[0]] == ["d_y"]


def test_what_is_not_finite_is_found() -> None:
    spoils["out"] = lambda x: x.at[0, 0].set(jnp.nan)
    assert failures()[1][0] == "NaN or inf in out"


def test_the_gradient_is_that_of_the_activation() -> None:
    """By finite differences in float64."""
    case = SMALL[0]
    inputs = selfcheck_layers.make_inputs(case)
    y, step = inputs["y"], 1e-6

    def loss(y: np.ndarray) -> float:
        results = selfcheck_layers.reference({**inputs, "y": y}, case)
        return sum(float(np.sum(results[x] * inputs[f"d_{x}"])) for x in ("q", "k", "v"))

    d_y = selfcheck_layers.reference(inputs, case)["d_y"]
    for index in [(0, 0, 0), (1, 4, 7), (0, 3, 40), (1, 2, 95)]:
        moved = np.zeros_like(y)
        moved[index] = step
        slope = (loss(y + moved) - loss(y - moved)) / (2 * step)
        assert d_y[index] == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_cases_are_of_both_dtypes_and_kernels() -> None:
    kinds = {(case.kernel, case.dtype) for case in FULL}
    assert len(kinds) == 4
    assert {case.write_gate for case in FULL} == {False, True}
    assert all(case.shape[1] == 1 for case in FULL if case.kernel == "decode")
    assert {(x.kernel, x.dtype) for x in selfcheck_layers.QUICK} == {
        ("activation", "bfloat16"),
        ("decode", "bfloat16"),
    }
