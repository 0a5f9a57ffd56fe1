"""The search for a tuning config: what it starts from, without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tuning
from pallas_kernels import target
from pallas_kernels.recurrence import TuningConfig, calls, recurrence


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["A", "D"])
@pytest.mark.parametrize("pass_name", ["forward", "forward-keeping", "backward"])
def test_the_search_starts_from_what_a_call_uses(
    pass_name: str, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[TuningConfig] = []
    kernel = pass_name.partition("-")[0]

    def seen(*arguments: Any, **_: Any) -> Any:
        used.extend(x for x in arguments if isinstance(x, TuningConfig))
        raise NotImplementedError("seen")

    monkeypatch.setattr(calls, kernel, seen)
    shape = tuning.NAMED[name]
    inputs = jax.eval_shape(lambda: tuning.make_inputs(shape, dtype, jax.random.key(0)))
    d_out = inputs.pop("d_out")

    def out(arrays: Any) -> Any:
        options: Any = {"write_gate": None, "initial_state": None}
        return recurrence(**arrays, **options, linear_state=False, saved_state_interval=32)[0]

    def gradient(arrays: Any, d_out: Any) -> Any:
        return jax.vjp(out, arrays)[1](d_out)

    searched = tuning.PASSES[pass_name]
    run = gradient if searched.with_gradient else lambda arrays, _: out(arrays)
    with pytest.raises(NotImplementedError, match="seen"):
        jax.eval_shape(run, inputs, d_out)
    sizes = shape.B, shape.H, shape.N, shape.N, target.current(), jnp.dtype(dtype)
    assert used == [searched.choose(*sizes)]
