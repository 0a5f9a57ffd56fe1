"""The kernels of what a layer does between its matmuls on a GPU, against XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel
from e88_jax.naive import rms_ratio
from pallas_kernels import target
from tests.reference.configs import e88_layer, lm_config
from tests.reference.layer_by_xla import OPTIONS, a_layer, decoded, inputs
from tests.reference.layer_by_xla import activated as activated_by_xla

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)

from pallas_kernels.decode import DecodeConfig, decode_layer
from pallas_kernels.qkv_activation import HeadColumns, activate

BOUNDS = {"float32": 2e-6, "bfloat16": 3e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("shape", "sizes", "n_rest", "n_padding"),
    [
        ((8, 2048), (72, 32, 32), 72, 8),
        ((1, 1), (3, 16, 8), 0, 0),
        ((3, 75), (5, 64, 32), 8, 0),
        ((2, 100), (7, 128, 24), 16, 24),
        ((4, 33), (2, 48, 96), 0, 0),
        ((1, 9), (16, 8, 8), 24, 8),
        # More than 2**32 bytes.
        ((8, 40_000), (72, 32, 32), 0, 0),
    ],
    ids=str,
)
def test_activation_against_xla(
    shape: tuple[int, int], sizes: tuple[int, int, int], n_rest: int, n_padding: int, dtype: str
) -> None:
    if dtype == "float32" and shape[1] > 10_000:
        pytest.skip("as many bytes already in bfloat16")
    columns = HeadColumns(*sizes, silu=True, unit_length=True)
    keys = jax.random.split(jax.random.key(0), 5)
    x = 2 * jax.random.normal(keys[0], (*shape, columns.n_columns + n_rest + n_padding), dtype)

    d = tuple(
        jax.random.normal(key, y.shape, y.dtype)
        for key, y in zip(
            keys[1:], jax.eval_shape(lambda: activated_by_xla(columns, n_rest, x)), strict=True
        )
    )

    def both(function: Any, x: jax.Array, d: tuple[jax.Array, ...]) -> Any:
        results, pullback = jax.vjp(function, x)
        return *results[:3], *pullback(d)

    by_xla = functools.partial(activated_by_xla, columns, n_rest)
    by_kernel = functools.partial(activate, columns, n_rest=n_rest)
    expected, actual = (jax.jit(both, static_argnums=0)(f, x, d) for f in (by_xla, by_kernel))
    for name, y, wanted in zip(("q", "k", "v", "d_x"), actual, expected, strict=True):
        ratio = rms_ratio(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
        assert ratio < BOUNDS[dtype], f"{name} differs by {ratio}"


def test_activation_mapped_and_sharded() -> None:
    columns = HeadColumns(2, 16, 16, silu=True, unit_length=True)
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, columns.n_columns), "bfloat16")
    mapped = jax.vmap(lambda x: activate(columns, x, 0))(x)
    for i in range(3):
        alone = activate(columns, x[i], 0)
        for a, b in zip(mapped, alone, strict=True):
            np.testing.assert_array_equal(a[i], b)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    sharded = jax.jit(lambda x: activate(columns, x, 0), in_shardings=rows)(x[0])
    for a, b in zip(sharded, activate(columns, x[0], 0), strict=True):
        np.testing.assert_array_equal(a, b)


def check_token(
    layer: DecodeConfig, rows: int, dtype: str, *, has_write_gate: bool = False
) -> None:
    arrays: dict[str, Any] = {
        "write_gate": None,
        **inputs(layer, rows, jnp.dtype(dtype), has_write_gate),
    }
    wide = {**arrays, "x": arrays["x"].astype(np.float32)}  # nothing rounded on the way
    expected = jax.jit(decoded, static_argnums=0)(layer, **wide)
    actual = jax.jit(decode_layer, static_argnums=0)(layer, **arrays)
    # The approximate tanh of bfloat16 is within 2^-11.
    bounds = (BOUNDS[dtype], {"float32": 2e-6, "bfloat16": 1e-3}[dtype])
    for name, y, wanted, bound in zip(("out", "state"), actual, expected, bounds, strict=True):
        ratio = rms_ratio(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
        assert ratio < bound, f"{name} differs by {ratio}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(
    "sizes",
    [(72, 32, 32), (3, 4, 4), (5, 16, 16), (2, 48, 48), (7, 64, 64), (2, 72, 36), (3, 128, 128)],
    ids=str,
)
def test_token_against_xla(sizes: tuple[int, int, int], rows: int, dtype: str) -> None:
    check_token(a_layer(*sizes), rows, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_a_token(options: dict[str, Any], dtype: str) -> None:
    check_token(a_layer(5, 32, 64, **options), 2, dtype, has_write_gate=True)


def test_states_of_more_than_2_to_the_31_bytes() -> None:
    check_token(a_layer(40, 128, 128), 1000, "bfloat16")


def test_token_mapped_and_sharded() -> None:
    layer = a_layer(3, 16, 48)
    arrays = inputs(layer, 4, jnp.bfloat16, False)
    x, decay, state = (jnp.asarray(arrays[name]) for name in ("x", "decay", "state"))

    def run(*arguments: jax.Array) -> Any:
        x, decay, state = arguments
        return decode_layer(layer, x, decay, None, state)

    expected = run(x, decay, state)
    mapped = jax.vmap(run)(*(y.reshape(2, 2, *y.shape[1:]) for y in (x, decay, state)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    sharded = jax.jit(run, in_shardings=rows)(x, decay, state)
    for a, b, wanted in zip(mapped, sharded, expected, strict=True):
        np.testing.assert_array_equal(a.reshape(wanted.shape), wanted)
        np.testing.assert_array_equal(b, wanted)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"write_gate": True, "decay_mode": "simple", "output_gate": "sigmoid"}],
    ids=["default", "options"],
)
def test_a_model_for_inference(options: dict[str, Any], batch: int) -> None:
    """Token by token it computes what the model does with all at once."""
    sizes = {"dim": 96, "n_heads": 5, "n_state": 32, "depth": 2}

    def build(implementation: Any) -> LanguageModel:
        execution = {"dtype": "float32", "implementation": implementation}
        return LanguageModel(lm_config(**sizes, **options, **execution), rngs=nnx.Rngs(0))

    model, reference = build(None), build("scan")
    tokens = jax.random.randint(jax.random.key(0), (batch, 12), 0, 256)
    same, state, actual = model.for_inference(), model.init_state(batch), []
    with jax.default_matmul_precision("highest"):
        expected, _ = reference(tokens)
        for t in range(tokens.shape[1]):
            logits, state = same(tokens[:, t : t + 1], state)
            actual.append(logits)
    np.testing.assert_allclose(jnp.concatenate(actual, axis=1), expected, atol=1e-4)
    assert "e88_decode_layer" in str(jax.make_jaxpr(lambda x: same(x, state))(tokens[:, :1]))


@pytest.mark.parametrize("n_heads", [5, 8])
def test_gradients_of_a_layer(n_heads: int) -> None:
    """Those of weights and inputs, with kernels between the matmuls, are those of the scan."""
    x = jax.random.normal(jax.random.key(0), (3, 50, 64))

    def gradients(implementation: Any) -> Any:
        sizes = {"dim": 64, "n_heads": n_heads, "n_state": 32}
        layer = e88_layer(
            **sizes, dtype="float32", implementation=implementation, saved_state_interval=32
        )
        graphdef, params = nnx.split(E88Mixer(*layer, rngs=nnx.Rngs(0)))

        def loss(params: Any, x: jax.Array) -> jax.Array:
            y, state = nnx.merge(graphdef, params)(x)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state.recurrent))

        function = jax.grad(loss, argnums=(0, 1))
        has_kernel = "e88_activation_backward" in str(jax.make_jaxpr(function)(params, x))
        assert has_kernel is (implementation is None)
        return jax.jit(function)(params, x)

    with jax.default_matmul_precision("highest"):
        actual, expected = gradients(None), gradients("scan")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert rms_ratio(np.asarray(a), np.asarray(b)) < 2e-5
