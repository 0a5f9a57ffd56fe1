"""The kernels, lowered for a GPU that need not be there: layouts, alignment and sizes of copies."""

from typing import Any

import jax
import pytest

from pallas_kernels import recurrence

# (B, T, H, N, V), each with a sibling where N and V differ.
MODELS = {
    "A": (8, 2048, 72, 32, 32),
    "B": (8, 512, 384, 32, 32),
    "C": (1, 2048, 72, 32, 32),
    "D": (8, 2048, 40, 64, 64),
    "E": (4, 2048, 16, 128, 128),
    "F": (8, 2048, 48, 48, 48),
}
ODD = {
    "decoding": (4, 1, 8, 32, 32),
    "shorter than a chunk": (2, 5, 8, 32, 32),
    "T 31": (2, 31, 5, 16, 16),
    "T 2049, H 83": (2, 2049, 83, 48, 48),
    "H 1": (3, 100, 1, 12, 20),
    "V < N": (2, 64, 6, 128, 4),
    "V > N": (2, 64, 6, 4, 128),
    "V of 100": (2, 64, 3, 72, 100),
    "70,000 blocks": (70_000, 64, 1, 32, 32),
    "2**31 elements": (65, 8192, 128, 32, 32),
}


def lower(
    shape: tuple[int, int, int, int, int], dtype: str, options: tuple[str, ...] = ()
) -> tuple[int, int]:
    """The numbers of kernels in the results alone, and in them and the gradients."""
    batch, time, heads, n_state, n_value = shape

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    per_step = (batch, time, heads)
    arrays = {
        "q": array(*per_step, n_state, dtype=dtype),
        "k": array(*per_step, n_state, dtype=dtype),
        "v": array(*per_step, n_value, dtype=dtype),
        "decay": array(*per_step),
        "write_gate": array(*per_step) if "write_gate" in options else None,
        "initial_state": (
            array(batch, heads, n_state, n_value) if "initial_state" in options else None
        ),
    }
    ids = array(batch, time, dtype="int32") if "segment_ids" in options else None
    cotangents = arrays["v"], array(batch, heads, n_state, n_value)

    def results(arrays: Any, ids: Any) -> Any:
        return recurrence(
            **arrays,
            segment_ids=ids,
            linear_state="linear_state" in options,
            checkpoint_every=32,
        )

    def gradients(arrays: Any, ids: Any, cotangents: Any) -> Any:
        _, pullback = jax.vjp(lambda arrays: results(arrays, ids), arrays)
        return pullback(cotangents)

    def kernels(f: Any, *arguments: Any) -> int:
        program = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        return program.count("@mosaic_gpu")

    return kernels(results, arrays, ids), kernels(gradients, arrays, ids, cotangents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*MODELS, *ODD])
def test_shapes(name: str, dtype: str) -> None:
    assert lower((MODELS | ODD)[name], dtype) == (1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        ("write_gate",),
        ("initial_state",),
        ("segment_ids",),
        ("write_gate", "initial_state", "segment_ids", "linear_state"),
    ],
    ids="+".join,
)
def test_options(options: tuple[str, ...], dtype: str) -> None:
    assert lower((2, 70, 4, 32, 32), dtype, options) == (1, 2)


@pytest.mark.parametrize("size", range(4, 129, 4))
def test_sizes(size: int) -> None:
    dtype = "bfloat16" if size % 8 else "float32"
    assert lower((2, 100, 4, size, size), dtype, ("write_gate", "segment_ids")) == (1, 2)
    if size > 64:
        other = {"bfloat16": "float32", "float32": "bfloat16"}[dtype]
        assert lower((2, 100, 4, size, size), other) == (1, 2)
