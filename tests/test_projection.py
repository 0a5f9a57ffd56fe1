from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.projection import (
    COLUMNS_MULTIPLE,
    InferenceProjection,
    InputProjections,
    JoinedInputProjections,
    Projection,
    TransposedProjection,
    multiply,
)
from pallas_kernels import target
from tests.reference.configs import e88_layer, name_of

TARGETS = {"cpu": target.CPU, "gpu": target.H100}


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def primitives(function: Any, *arguments: jax.Array) -> set[str]:
    return {str(x.primitive) for x in jax.make_jaxpr(function)(*arguments).eqns}


def projection_of(matrix: jax.Array) -> Projection:
    """The projection by a matrix `[n_in, n_out]`."""

    def kernel_init(key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        del key, shape, dtype, out_sharding
        return matrix

    (n_in, n_out), dtype = matrix.shape, jnp.dtype(matrix.dtype)
    return Projection((n_in,), (n_out,), dtype=dtype, kernel_init=kernel_init, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (2, 3, 6), (1, 6), (0, 1, 6)])
def test_matmuls(shape: tuple[int, ...]) -> None:
    x, matrix = numbers(*shape), numbers(6, 4)
    expected = np.asarray(x) @ np.asarray(matrix)
    np.testing.assert_allclose(multiply(x, matrix), expected, rtol=1e-5, atol=1e-6)
    transposed = TransposedProjection([projection_of(matrix)], (4,))
    assert transposed.kernel.shape == (4, 6)
    np.testing.assert_allclose(transposed(x), expected, rtol=1e-5, atol=1e-6)
    # One row is summed.
    assert ("dot_general" in primitives(transposed, x)) is (x.size != 6)


def test_a_row_of_bfloat16_is_summed_in_float32() -> None:
    x, kernel = jnp.ones((1, 4096), jnp.bfloat16), jnp.full((2, 4096), 1.0078125, jnp.bfloat16)
    y = TransposedProjection([projection_of(kernel.T)], (2,))(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.full((1, 2), 4128, jnp.bfloat16))
    # So is a product, which bfloat16 would round to the number that is then subtracted.
    x = jnp.asarray([[1.0078125, -1]], jnp.bfloat16)
    kernel = jnp.asarray([[1.0078125, 1.015625]], jnp.bfloat16)
    assert TransposedProjection([projection_of(kernel.T)], (1,))(x).item() == 2**-14


@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize(
    ("in_shape", "out_shape"), [((6,), (6,)), ((6,), (3, 2)), ((3, 2), (6,)), ((3, 2), (2, 3))]
)
def test_for_inference(device: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    init = nnx.initializers.normal()
    projection = Projection(
        in_shape, out_shape, dtype=jnp.dtype("bfloat16"), kernel_init=init, rngs=nnx.Rngs(0)
    )
    x = numbers(2, 3, *in_shape)
    expected = projection(x)
    assert expected.shape == (2, 3, *out_shape)
    with target.use(TARGETS[device]):
        inference = projection.for_inference()
        assert inference.for_inference() is inference
    kind = TransposedProjection if device == "gpu" else InferenceProjection
    assert type(inference) is kind
    assert inference.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(inference(x), expected)
    assert projection.kernel.dtype == jnp.float32
    assert projection.kernel.shape == (*in_shape, *out_shape)


# All that has a say in which projections there are, and how wide.
READS: list[dict[str, Any]] = [
    {},
    {"output_gate": "none", "decay_mode": "simple"},
    {"decay_mode": "none", "write_gate": True, "expansion": 0.5},
    {"tie_kv": True, "write_gate": True, "decay_mode": "constant"},
    {"head_mix": "input_weighted", "expansion": 2.0},
    {"head_mix": "input_weighted", "tie_kv": True, "output_gate": "none", "decay_mode": "none"},
]


@pytest.mark.parametrize("options", READS, ids=name_of)
@pytest.mark.parametrize("rows", [1, 8])
def test_joined_reads_are_each_projection_alone(options: dict[str, Any], rows: int) -> None:
    """By as many matmuls as there are groups, or for few tokens each by its own."""
    layer = e88_layer(**options)
    config = layer.config
    dtype = jnp.dtype(jnp.float32)
    trained = InputProjections(config, layer.dim, dtype, rngs=nnx.Rngs(0))
    x = numbers(2, rows, layer.dim)
    columns = config.n_heads * config.head_columns
    for inputs in (trained, trained.for_inference()):
        y, *others = inputs(x)
        expected = trained.qkv(x).reshape(2, rows, columns)
        np.testing.assert_allclose(y[:, :, :columns], expected, rtol=1e-5, atol=1e-6)
        read = inputs.split(y[:, :, columns:], *others)
        for name, found in read._asdict().items():
            projection = getattr(trained, name)
            assert (found is None) is (projection is None)
            if found is not None:
                np.testing.assert_allclose(found, projection(x), rtol=1e-5, atol=1e-6)


def test_the_gate_of_joined_reads_starts_where_it_says() -> None:
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"decay_mode": "none"},
        {"decay_mode": "simple", "write_gate": True},
    )
    for options in choices:
        layer = e88_layer(**options)
        dtype = jnp.dtype(jnp.float32)
        trained = InputProjections(layer.config, layer.dim, dtype, rngs=nnx.Rngs(0))
        joined, x = trained.for_inference(), numbers(2, 1, layer.dim)
        (y,) = joined(x)
        start = joined.gate_start(layer.config.n_heads * layer.config.head_columns)
        assert trained.gate is not None
        gate = trained.gate(x).reshape(2, 1, -1)
        found = y[:, :, start : start + gate.shape[2]]
        np.testing.assert_allclose(found, gate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("n_heads", [3, 8])
def test_columns_are_whole_pieces(n_heads: int, rows: int) -> None:
    """With any number of heads a matmul of several projections has rows that are aligned."""
    layer = e88_layer(n_heads=n_heads, n_state=8)
    dtype = jnp.dtype(jnp.bfloat16)
    inputs = InputProjections(layer.config, layer.dim, dtype, rngs=nnx.Rngs(0))
    x = jnp.ones((2, rows, layer.dim), dtype)
    for reads, n_alone in ((inputs, 1), (inputs.for_inference(), 0)):
        matmuls = reads(x)
        joined = matmuls[: len(matmuls) - n_alone]  # the gate's is the only one of its matmul
        assert [y.shape[2] % COLUMNS_MULTIPLE for y in joined] == [0]
        assert all(y.dtype == dtype for y in matmuls)


def test_for_inference_joins_once() -> None:
    layer = e88_layer()
    inputs = InputProjections(layer.config, layer.dim, jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(inputs))
    joined = inputs.for_inference()
    assert type(joined) is JoinedInputProjections
    assert joined.for_inference() is joined
    assert [x.dtype for x in jax.tree.leaves(nnx.state(joined))] == [jnp.bfloat16]
    chex.assert_trees_all_equal(nnx.state(inputs), before)
