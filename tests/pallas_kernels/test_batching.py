"""Calls over rows that are mapped, sharded, and both."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.batching import over_rows


def of_rows(x: Array, scale: Array, state: Array | None) -> tuple[Array, Array]:
    """Sums over time of each row and head."""
    total = jnp.cumsum(x * scale[:, None, :, None], axis=1)
    total += 0 if state is None else state[:, None]
    return total, total[:, -1]


CALL = over_rows(
    of_rows, ("b t h n", "b h", "b h n"), lambda *_: ("b t h n", "b h n"), partition=True
)


def arrays(*mapped: int) -> list[Array]:
    sizes = (*mapped, 4, 5, 2, 3), (*mapped, 4, 2), (*mapped, 4, 2, 3)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


def of_each(n: int, function: Any) -> Any:
    for _ in range(n):
        function = jax.vmap(function)
    return function


def check(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("mapped", [(), (3,), (2, 3)])
def test_mapped(mapped: tuple[int, ...]) -> None:
    x = arrays(*mapped)
    run = of_each(len(mapped), CALL)
    check(jax.jit(run)(*x), of_each(len(mapped), of_rows)(*x))


def test_some_mapped_and_some_left_out() -> None:
    x, scale, _ = arrays(3)
    scale = scale[0]

    def run(call: Any) -> Any:
        return jax.vmap(lambda x: call(x, scale, None))(x)

    check(run(CALL), run(of_rows))
    check(jax.vmap(CALL, in_axes=(2, None, 0))(jnp.moveaxis(x, 0, 2), scale, None), run(of_rows))


@pytest.mark.parametrize("spec", [P(None, "rows"), P("rows"), P(None, None, None, "rows")])
def test_mapped_and_sharded_nothing_is_exchanged(spec: P) -> None:
    """Rows, what is mapped, or heads are over the devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    without_time = P(*spec[:2], *spec[3:])
    shardings = [NamedSharding(mesh, x) for x in (spec, without_time, without_time)]
    x = [jax.device_put(x, there) for x, there in zip(arrays(2), shardings, strict=True)]
    program = jax.jit(jax.vmap(CALL)).lower(*x).compile()
    check(program(*x), jax.vmap(of_rows)(*x))
    assert not re.search("all-|collective", program.as_text() or "all-")
    out, last = program.output_shardings
    assert out.is_equivalent_to(shardings[0], 5)
    assert last.is_equivalent_to(shardings[2], 4)


def test_mapped_calls_alike_are_one_function() -> None:
    """Else JAX, from 0.11 on, traces each and compiles its kernels again."""

    def traces(mapped: int) -> int:
        traced = list[tuple[int, ...]]()

        def call(x: Array) -> Array:
            traced.append(x.shape)
            return x + 1

        run = of_each(mapped, over_rows(call, ("b t",), lambda *_: "b t", partition=True))
        jax.make_jaxpr(lambda x: run(run(run(run(x)))))(jnp.zeros((3, 2, 5)[1 - mapped :]))
        return len(traced)

    assert traces(mapped=1) == 2 * traces(mapped=0) > 0


def test_no_derivative() -> None:
    with pytest.raises(NotImplementedError, match="differentiates once"):
        jax.grad(lambda x: jnp.sum(CALL(x, *arrays()[1:])[0]))(arrays()[0])
