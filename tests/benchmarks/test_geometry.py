"""The search for a tuning config: what it starts from, without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import geometry
from pallas_kernels import Geometry, calls, recurrence


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["A", "D"])
@pytest.mark.parametrize("pass_name", ["forward", "forward-keeping", "backward"])
def test_the_search_starts_from_what_a_call_uses(
    pass_name: str, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Geometry] = []
    kernel = pass_name.partition("-")[0]

    def seen(*arguments: Any, **_: Any) -> Any:
        used.extend(x for x in arguments if isinstance(x, Geometry))
        raise NotImplementedError("seen")

    monkeypatch.setattr(calls, kernel, seen)
    shape = geometry.NAMED[name]
    inputs = jax.eval_shape(lambda: geometry.make_inputs(shape, dtype, jax.random.key(0)))
    d_out = inputs.pop("d_out")

    def out(arrays: Any) -> Any:
        options = {"write_gate": None, "initial_state": None}
        return recurrence(**arrays, **options, linear_state=False, saved_state_interval=32)[0]

    def gradient(arrays: Any, d_out: Any) -> Any:
        return jax.vjp(out, arrays)[1](d_out)

    searched = geometry.PASSES[pass_name]
    run = gradient if searched.with_gradient else lambda arrays, _: out(arrays)
    with pytest.raises(NotImplementedError, match="seen"):
        jax.eval_shape(run, inputs, d_out)
    n_sms = getattr(jax.devices()[0], "core_count", 132)
    sizes = shape.B, shape.H, shape.N, shape.N, n_sms, jnp.dtype(dtype)
    assert used == [searched.choose(*sizes)]
