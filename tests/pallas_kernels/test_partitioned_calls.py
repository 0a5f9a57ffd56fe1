"""Calls that XLA divides over devices: their functions have no side effects, which it refuses."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from pallas_kernels.decode import decode_layer
from pallas_kernels.qkv_activation import HeadColumns, activate
from pallas_kernels.recurrence import recurrence
from tests.reference.layer_by_xla import a_layer, inputs


def check(function: Any, *arguments: Any) -> None:
    functions = list(partitioned(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert functions
    assert not any(function.effects for function in functions)


def partitioned(jaxpr: Any) -> Iterator[Any]:
    """The functions that are partitioned, as jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_partitioning":
            yield equation.params["call"]
        for inner in jaxprs_in_params(equation.params):
            yield from partitioned(inner)


def test_recurrence() -> None:
    decay, options = jnp.ones((2, 9, 4)), {"linear_state": False, "saved_state_interval": 32}

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(recurrence(x, x, x, decay, None, None, **options)[0])

    check(jax.grad(loss), jnp.zeros((2, 9, 4, 16)))


def test_activation() -> None:
    columns = HeadColumns(4, 16, 16, True, True)
    x = jnp.zeros((2, 9, columns.n_columns))
    check(jax.grad(lambda x: sum(map(jnp.sum, activate(columns, x, 0)), jnp.zeros(()))), x)


def test_decoding() -> None:
    layer = a_layer(2, 32, 32)
    arrays = inputs(layer, 3, jnp.bfloat16, True)
    check(lambda arrays: decode_layer(layer, **arrays), arrays)
