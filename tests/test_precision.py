"""The precision policy, and that the layer follows it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from test_mixer import OPTIONS, make_config, name_of

from e88_jax.mixer import E88Mixer
from e88_jax.precision import compute_dtype, wide, wide_dtype


@pytest.mark.parametrize(
    ("backend", "dtype"), [("gpu", "bfloat16"), ("cpu", "float32"), ("tpu", "float32")]
)
def test_products_are_narrow_on_a_gpu(
    backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
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
"""What norms, gates, decay, softmax and the recurrence are made of."""


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_only_products_of_a_layer_are_narrow(options: dict[str, Any]) -> None:
    config = make_config(options, "bfloat16")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: E88Mixer(config, rngs=nnx.Rngs(0))))

    def layer(params: Any, x: Any) -> Any:
        return nnx.merge(graphdef, params)(x)

    x = jax.ShapeDtypeStruct((2, 3, config.dim), jnp.bfloat16)
    seen = [*equations(jax.make_jaxpr(layer)(params, x).jaxpr)]
    narrow = [
        equation.primitive.name
        for equation in seen
        for value in equation.invars
        if value.aval.dtype == jnp.bfloat16 and equation.primitive.name in _WIDE
    ]
    assert narrow == []
    products = {
        value.aval.dtype.name
        for equation in seen
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2
        for value in equation.invars
    }
    assert products == {"bfloat16"}
