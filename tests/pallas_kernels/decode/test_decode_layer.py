"""The decode kernel: its lane program in NumPy, and lowered for a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.naive import rms_ratio
from pallas_kernels.common.sizes import WARPS
from pallas_kernels.decode import DecodeConfig, decode_layer
from pallas_kernels.decode.lanes import token_of_row
from pallas_kernels.limits import UnsupportedError
from tests.reference.lane_ops_in_numpy import lane_ops, memory
from tests.reference.layer_by_xla import OPTIONS, a_layer, decoded, inputs

BOUNDS = {jnp.float32: 2e-6, jnp.bfloat16: 2.5e-3}
"""Bounds of ||x - reference|| / ||reference||; in bfloat16 one rounding of the outputs."""

over_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])


def check(layer: DecodeConfig, dtype: Any, *, has_write_gate: bool = False) -> None:
    """The lane program against XLA in float32."""
    columns = layer.columns
    arrays = inputs(layer, 1, dtype, has_write_gate)
    wide = {"write_gate": None, **{name: x.astype(np.float32) for name, x in arrays.items()}}
    out, state = jax.jit(functools.partial(decoded, layer))(**wide)
    # Padded to words of 4 bytes, of which an odd row of bfloat16 fills half of the last.
    ref = {name: memory(x[0].copy()) for name, x in arrays.items() if name != "x"}
    row = arrays["x"][0]
    ref["x"] = memory(np.pad(row, (0, row.size % 2)))[: row.size]
    ref["out"] = memory(np.full(columns.n_heads * columns.n_value, np.nan, dtype))
    for group in range(-(-layer.warps // WARPS)):
        w = lane_ops()
        token_of_row(w, layer, group, ref)
        assert w.tanhs == (set() if layer.linear_state else {dtype == jnp.bfloat16})
    for name, wanted, bound in (("out", out, BOUNDS[dtype]), ("state", state, 2e-6)):
        ratio = rms_ratio(ref[name].array.astype(np.float64), np.asarray(wanted[0], np.float64))
        assert ratio < bound, f"{name} differs by {ratio}"


@over_dtypes
@pytest.mark.parametrize(
    ("heads", "n_state", "n_value"),
    [(3, 32, 32), (5, 16, 16), (2, 48, 48), (2, 128, 128), (3, 4, 4), (2, 72, 36), (4, 20, 100)],
)
def test_sizes(heads: int, n_state: int, n_value: int, dtype: Any) -> None:
    check(a_layer(heads, n_state, n_value), dtype)


@over_dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], dtype: Any) -> None:
    check(a_layer(3, 16, 32, **options), dtype)
    check(a_layer(3, 16, 32, **options), dtype, has_write_gate=True)


@over_dtypes
@pytest.mark.parametrize("mapped", [False, True], ids=["", "mapped"])
@pytest.mark.parametrize("has_write_gate", [False, True], ids=["", "write_gate"])
def test_lowering(has_write_gate: bool, mapped: bool, dtype: Any) -> None:
    layer = a_layer(5, 32, 48)
    arrays = {"write_gate": None, **inputs(layer, 3, dtype, has_write_gate)}
    names = ("x", "decay", "write_gate", "state")

    def run(*arguments: Any) -> Any:
        return decode_layer(layer, *arguments)

    arguments = [arrays[name] for name in names]
    if mapped:
        run = jax.vmap(run)
        arguments = jax.tree.map(lambda x: np.stack([x, x]), arguments)
    traced = jax.jit(run, donate_argnums=3).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = (line for line in lowered.splitlines() if "custom_call" in line)
    # The state is updated in place.
    assert f"output_tuple_indices = [1], operand_index = {2 + has_write_gate}" in kernel
    out, state = traced.out_info
    rows = (2, 3) if mapped else (3,)
    assert out.shape == (*rows, 5 * 48)
    assert out.dtype == dtype
    assert state.shape == (*rows, 5, 32, 48)


def test_errors() -> None:
    layer = a_layer(2, 32, 32)
    arrays = inputs(layer, 3, jnp.bfloat16, True)
    names = ("x", "decay", "write_gate", "state")
    for name in names[1:]:
        narrow = {**arrays, name: arrays[name].astype(jnp.bfloat16)}
        with pytest.raises(ValueError, match=f"{name} must be float32, got bfloat16"):
            decode_layer(layer, *(narrow[n] for n in names))
    with pytest.raises(ValueError, match=r"empty.*\(0, 256\)"):
        decode_layer(layer, *(arrays[n][:0] for n in names))

    def loss(*arguments: Any) -> Any:
        return jnp.sum(decode_layer(layer, *arguments)[1])

    with pytest.raises(NotImplementedError, match="inference cannot be differentiated"):
        jax.grad(loss)(*(arrays[n] for n in names))


@pytest.mark.parametrize(
    ("layer", "dtype", "fragments"),
    [
        (a_layer(2, 32, 30), jnp.bfloat16, ["V", "30"]),
        (a_layer(2, 132, 32), jnp.bfloat16, ["N", "128", "132"]),
        (a_layer(2, 32, 32), jnp.float16, ["float32 and bfloat16", "float16"]),
    ],
)
def test_refusals(layer: DecodeConfig, dtype: Any, fragments: list[str]) -> None:
    """Raised before the kernel is traced."""
    arrays = {"write_gate": None, **inputs(layer, 1, dtype, False)}
    with pytest.raises(UnsupportedError) as error:
        decode_layer(layer, **arrays)
    for fragment in fragments:
        assert fragment in str(error.value)
