"""Operations of training, against the arrays that the products and the recurrence work on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params

from e88_jax.config import E88Config, LMConfig
from e88_jax.model import E88LM
from e88_jax.sizing import PRESETS, training_flops

TOKENS = (2, 64)


def product_flops(jaxpr: Any) -> int:
    """Of all matrix products with no batch dimensions, which the recurrence has."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), (batched, _)) = equation.params["dimension_numbers"]
            if not batched:
                left = equation.invars[0].aval.shape
                (out,) = equation.outvars
                total += 2 * out.aval.size * jnp.prod(jnp.array([left[i] for i in contracted]))
        for sub in jaxprs_in_params(equation.params):
            total += product_flops(sub)
    return int(total)


def test_the_products_of_a_forward_and_backward_pass() -> None:
    layer = E88Config(dim=96, n_heads=5, n_state=8, dtype="float32", implementation="scan")
    config = LMConfig(layer=layer, depth=2, vocab_size=50, channel_mixer_dim=40)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: E88LM(config, rngs=nnx.Rngs(0))))

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, params)(tokens)[0])

    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens)
    counted = product_flops(jaxpr.jaxpr) / (TOKENS[0] * TOKENS[1])
    assert abs(training_flops(config).products / counted - 1) < 0.01


def test_a_preset() -> None:
    flops = training_flops(PRESETS["h72n32-500m"].config)
    assert flops.products == 6 * 505_089_472
    assert flops.recurrence == 26 * 20 * 72 * 32 * 32
