"""What the programs that time the kernels on a GPU run, without one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import recurrence_step, tuning
from e88_jax.recurrence import e88_recurrence
from pallas_kernels import target
from pallas_kernels.recurrence import TuningConfig, calls, recurrence


def test_decoding_step_by_step_is_the_recurrence() -> None:
    inputs = recurrence_step.make_inputs(
        recurrence_step.Shape("", 2, 5, 3, 8), "float32", jax.random.key(0)
    )
    state, out = recurrence_step.make_program(recurrence_step.WAYS["plain JAX"])(**inputs)
    del inputs["d_out"]
    expected, expected_state = e88_recurrence(**inputs, implementation="scan")
    np.testing.assert_allclose(jnp.moveaxis(out[:, :, 0], 0, 1), expected, atol=1e-6)
    np.testing.assert_allclose(state, expected_state, atol=1e-6)


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
