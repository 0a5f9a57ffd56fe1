"""The program that times a step of decoding: what it runs, without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import recurrence_step
from e88_jax.recurrence import e88_recurrence


def test_decoding_step_by_step_is_the_recurrence() -> None:
    inputs = recurrence_step.make_inputs(
        recurrence_step.Shape("", 2, 5, 3, 8), "float32", jax.random.key(0)
    )
    state, out = recurrence_step.make_program(recurrence_step.WAYS["plain JAX"])(**inputs)
    del inputs["d_out"]
    expected, expected_state = e88_recurrence(**inputs, implementation="scan")
    np.testing.assert_allclose(jnp.moveaxis(out[:, :, 0], 0, 1), expected, atol=1e-6)
    np.testing.assert_allclose(state, expected_state, atol=1e-6)
