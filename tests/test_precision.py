"""The precision policy, and that the layer follows it."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from e88_jax import E88Mixer, LanguageModel
from e88_jax.activation import activate, l2_normalize
from e88_jax.precision import compute_dtype, wide, wide_dtype
from pallas_kernels import target
from tests.reference.configs import E88_OPTIONS, e88_layer, lm_config, name_of


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (target.H100, "bfloat16"),
        (target.CPU, "float32"),
        (target.Target("tpu", "TPU v5e"), "float32"),
    ],
    ids=lambda x: getattr(x, "platform", x),
)
def test_matmuls_are_narrow_on_a_gpu(device: target.Target, dtype: str) -> None:
    with target.use(device):
        assert compute_dtype(None) == dtype
        for configured in ("float32", "bfloat16", "float64"):
            assert compute_dtype(configured) == configured


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_wide(dtype: str, wider: str, x64: None) -> None:
    assert wide_dtype(jnp.dtype(dtype)) == wider
    assert wide(jnp.ones(2, dtype)).dtype == wider


_WIDE = {"exp", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt", "div", "reduce_sum"}
"""Primitives of norms, gates, decay, softmax and the recurrence."""


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def equations_of(module: Callable[[], Any], *inputs: Any) -> list[Any]:
    """Equations of a module over inputs, both given as shapes."""
    graphdef, params = nnx.split(nnx.eval_shape(module))

    def call(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, params)(*inputs)

    return [*equations(jax.make_jaxpr(call)(params, *inputs).jaxpr)]


def narrow_names(equations: list[Any]) -> list[str]:
    """Primitives that should be wide and have an input that is not."""
    return [
        equation.primitive.name
        for equation in equations
        for value in equation.invars
        if value.aval.dtype == jnp.bfloat16 and equation.primitive.name in _WIDE
    ]


@pytest.mark.parametrize("options", E88_OPTIONS, ids=name_of)
def test_only_matmuls_of_a_layer_are_narrow(options: dict[str, Any]) -> None:
    layer = e88_layer(**options, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, 3, layer.dim), jnp.bfloat16)
    seen = equations_of(lambda: E88Mixer(*layer, rngs=nnx.Rngs(0)), x)
    assert narrow_names(seen) == []
    matmuls = {
        value.aval.dtype.name
        for equation in seen
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2
        for value in equation.invars
    }
    assert matmuls == {"bfloat16"}


def test_the_residual_stream_norms_and_logits_are_wide() -> None:
    config = lm_config(dim=10, depth=2, vocab_size=19, dtype="bfloat16")
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    seen = equations_of(lambda: LanguageModel(config, rngs=nnx.Rngs(0)), tokens)
    assert narrow_names(seen) == []

    def dtypes(name: str, *shape: int) -> list[Any]:
        results = [(x.primitive.name, y.aval) for x in seen for y in x.outvars]
        return [y.dtype for found, y in results if (found, y.shape) == (name, shape)]

    assert dtypes("add", 2, 3, 10) == [jnp.float32] * config.depth  # the residual stream
    assert dtypes("dot_general", 2, 3, 19) == [jnp.float32]


def test_activation_rounds_once() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), "bfloat16")
    expected = jax.jit(lambda x: l2_normalize(jax.nn.silu(wide(x))).astype("bfloat16"))(x)
    np.testing.assert_array_equal(jax.jit(lambda x: activate(x, True, True))(x), expected)
