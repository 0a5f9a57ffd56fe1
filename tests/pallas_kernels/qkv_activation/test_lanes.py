"""SiLU and unit length of q, k and v: lane programs in NumPy, kernels lowered for a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.naive import rms_ratio
from pallas_kernels.limits import UnsupportedError
from pallas_kernels.qkv_activation import HeadColumns, activate
from pallas_kernels.qkv_activation.lanes import activate_rows, gradient_of_rows
from tests.reference.lane_ops_in_numpy import lane_ops, memory
from tests.reference.layer_by_xla import activated

BOUNDS = {jnp.float32: 1e-6, jnp.bfloat16: 2.5e-3}
"""Bounds of ||x - reference|| / ||reference||; in bfloat16 one rounding."""

over_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def activated_and_gradient(columns: HeadColumns, n_rest: int, x: Any, d: Any) -> tuple[Any, Any]:
    expected, pullback = jax.vjp(lambda x: activated(columns, n_rest, x), x)
    return expected, pullback(d)[0]


def check(
    columns: HeadColumns, n_tokens: int, dtype: Any, n_rest: int = 8, n_padding: int = 0
) -> None:
    """Results and gradients of the lane programs against the reference in float64."""
    rng = np.random.default_rng([columns.n_heads, columns.n_state, n_tokens])
    x = (2 * rng.normal(size=(n_tokens, columns.n_columns + n_rest + n_padding))).astype(dtype)
    x[:, : columns.n_state] = 0  # a head of zeros
    with jax.enable_x64(True):
        wide = x.astype(np.float64)
        shapes = jax.eval_shape(lambda x: activated(columns, n_rest, x), wide)
        d = [rng.normal(size=y.shape).astype(dtype) for y in shapes]
        d_wide = tuple(y.astype(np.float64) for y in d)
        expected, d_x_expected = activated_and_gradient(columns, n_rest, wide, d_wide)
    output, d_x = memory(x), memory(np.full(x.shape, np.nan, dtype))
    parts = columns.parts(x.shape[1], x.itemsize, n_rest)
    for part, wanted, d_y in zip(parts, expected, d, strict=True):
        own = slice(None), part.columns
        if part.name != "rest":
            y = memory(np.full((n_tokens, part.n_columns), np.nan, dtype))
            activate_rows(lane_ops(), part, output[own], y)
            ratio = rms_ratio(y.array.reshape(wanted.shape), np.asarray(wanted))
            assert ratio < BOUNDS[dtype], f"{part.name} differs by {ratio}"
        d_rows = memory(np.ascontiguousarray(d_y.reshape(n_tokens, -1)))
        gradient_of_rows(lane_ops(), part, output[own], d_rows, d_x[own])
    # A row of zeros has so large a gradient that the others would not count.
    rows = np.s_[:, columns.n_state :]
    ratio = rms_ratio(d_x.array[rows], np.asarray(d_x_expected)[rows])
    assert ratio < BOUNDS[dtype], f"the gradient differs by {ratio}"
    zeros = np.s_[:, : columns.n_state]
    ratio = rms_ratio(d_x.array[zeros], np.asarray(d_x_expected)[zeros])
    assert ratio < BOUNDS[dtype], f"the gradient of zeros differs by {ratio}"


def test_columns_are_head_major() -> None:
    columns = HeadColumns(2, 8, 16, True, True)
    taken = np.full(70, "", object)
    for part in columns.parts(70, 4):
        for head in range(part.heads):
            own = taken[part.columns][head * part.stride :][: part.rows.size]
            assert len(own) == part.rows.size
            own += f"{part.name}{head} "
    rows = ["q0", "k0", "v0", "v0", "q1", "k1", "v1", "v1"]
    assert [*taken[:64:8]] == [*taken[7:64:8]] == [f"{row} " for row in rows]
    assert [*taken[64:]] == ["rest0 "] * 4 + ["", ""]  # refused: not whole loads


@over_dtypes
@pytest.mark.parametrize("n_state", [8, 16, 24, 32, 48, 64, 96, 128])
def test_sizes(n_state: int, dtype: Any) -> None:
    check(HeadColumns(3, n_state, 32, True, True), 5, dtype)


@over_dtypes
@pytest.mark.parametrize("n_tokens", [1, 7, 40])
def test_tokens(n_tokens: int, dtype: Any) -> None:
    check(HeadColumns(5, 32, 16, True, True), n_tokens, dtype, n_rest=24)


@over_dtypes
@pytest.mark.parametrize("n_padding", [8, 24])
def test_padding_has_a_gradient_of_zeros(n_padding: int, dtype: Any) -> None:
    check(HeadColumns(2, 16, 16, True, True), 5, dtype, n_rest=16, n_padding=n_padding)


@over_dtypes
@pytest.mark.parametrize(("silu", "unit_length"), [(True, False), (False, True), (False, False)])
def test_options(silu: bool, unit_length: bool, dtype: Any) -> None:
    check(HeadColumns(2, 16, 16, silu, unit_length), 3, dtype)


def test_large_numbers() -> None:
    """SiLU of what overflows its exponential is 0 or the number."""
    x = np.repeat(np.array([-500, -90, 90, 500], np.float32), 8)[None]
    part = HeadColumns(1, 32, 32, True, False).parts(96, 4)[0]
    y, d_x = memory(np.zeros_like(x)), memory(np.zeros_like(x))
    activate_rows(lane_ops(), part, memory(x), y)
    np.testing.assert_allclose(y.array, np.where(x > 0, x, 0), atol=1e-30)
    gradient_of_rows(lane_ops(), part, memory(x), memory(np.ones_like(x)), d_x)
    np.testing.assert_allclose(d_x.array, np.where(x > 0, 1, 0), atol=1e-30)


@over_dtypes
@pytest.mark.parametrize(("n_rest", "n_padding"), [(0, 0), (72, 0), (72, 8), (70, 10)])
def test_lowering(n_rest: int, n_padding: int, dtype: Any) -> None:
    columns = HeadColumns(72, 32, 32, True, True)
    x = jax.ShapeDtypeStruct((3, 75, columns.n_columns + n_rest + n_padding), dtype)

    def loss(x: jax.Array) -> jax.Array:
        results = activate(columns, x, n_rest)
        assert results[3].shape[2] == n_rest + -n_rest % (16 // x.dtype.itemsize)
        return sum((jnp.sum(y.astype(jnp.float32)) for y in results), jnp.float32(0))

    lowered = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("e88_activation_backward") > 0
    lowered = jax.jit(loss).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "e88_activation_backward" not in lowered
    assert "e88_activation" in lowered


@pytest.mark.parametrize(
    ("columns", "n_columns", "dtype", "fragments"),
    [
        (HeadColumns(2, 32, 32, True, True), 192, jnp.float16, ["float32 and bfloat16", "float16"]),
        (HeadColumns(2, 20, 32, True, True), 144, jnp.bfloat16, ["N", "8", "20"]),
        (HeadColumns(2, 32, 4, True, True), 136, jnp.bfloat16, ["V", "8", "4"]),
        (HeadColumns(2, 32, 32, True, True), 194, jnp.bfloat16, ["columns", "8", "194"]),
        (HeadColumns(2, 72, 32, True, True), 352, jnp.bfloat16, ["N", "32", "72"]),
        (HeadColumns(2, 32, 72, True, True), 272, jnp.bfloat16, ["V", "32", "72"]),
    ],
)
def test_refusals(columns: HeadColumns, n_columns: int, dtype: Any, fragments: list[str]) -> None:
    """Raised before a kernel is traced."""

    def call(columns: HeadColumns, n_columns: int, dtype: Any) -> None:
        activate(columns, jax.ShapeDtypeStruct((1, 2, n_columns), dtype))  # pyright: ignore[reportArgumentType]

    with pytest.raises(UnsupportedError) as error:
        call(columns, n_columns, jnp.dtype(dtype))
    for fragment in fragments:
        assert fragment in str(error.value)
    fits = HeadColumns(2, 32, 32, True, True)
    with pytest.raises(UnsupportedError, match="columns a multiple of 4, got 194"):
        call(fits, 194, jnp.dtype(jnp.float32))
    fits.require_supported(196, "float32", 4)
    with pytest.raises(UnsupportedError, match="after v that are read, got 4 of padding"):
        fits.require_supported(196, "float32", 0)
