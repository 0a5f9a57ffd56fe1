"""The kernels compiled for a GPU that need not be there, or run on the GPU at hand as the other
takes them; `test_older_ptx_on_gpu.py` starts a process for each."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure.described_gpu import compiling_for
from e88_jax import hardware, naive, selfcheck
from e88_jax.selfcheck import Case
from pallas_kernels import target

CASES = (
    Case((2, 67, 5, 32, 32), "bfloat16", ("write_gate", "initial_state")),
    Case((1, 131, 3, 44, 100), "float32", ("write_gate", "initial_state")),
    Case((1, 40, 2, 128, 128), "bfloat16", ("write_gate", "initial_state")),
    # So many blocks for an SM that with 99 KB some states are in device memory.
    Case((8, 11, 40, 64, 64), "bfloat16", ("write_gate", "initial_state")),
    # And with 227 KB too.
    Case((8, 11, 40, 64, 64), "float32", ("write_gate", "initial_state")),
)


def both(
    arrays: dict[str, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> dict[str, jax.Array]:
    """Results and gradients by the kernels, as built for the target."""
    from pallas_kernels.recurrence import recurrence

    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_name: Any = arrays
        return recurrence(**by_name, linear_state=False, saved_state_interval=32)

    (out, final_state), pullback = jax.vjp(run, arrays)
    d_arrays = pullback(cotangents)[0]
    return {"out": out, "final_state": final_state} | {f"d_{x}": d_arrays[x] for x in d_arrays}


def given(case: Case) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Inputs, and cotangents of the results."""
    inputs = selfcheck.make_inputs(case)
    arrays = {x: jnp.asarray(inputs[x], selfcheck.dtype_of(x, case)) for x in inputs}
    return arrays, (arrays.pop("d_out"), arrays.pop("d_final_state"))


def compile_for(gpu: hardware.GPU, case: Case) -> None:
    """Compiles the kernels of a case; no GPU is needed."""
    with compiling_for(gpu.target) as (device,):
        sharding = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), given(case)
        )
        jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def run_as(gpu: hardware.GPU, case: Case) -> None:
    """Runs a case on the GPU at hand; prints the ratio of each result to `naive` as JSON."""
    with target.use(gpu.target):
        results = jax.jit(both)(*given(case))
    expected = selfcheck.reference(selfcheck.make_inputs(case), linear_state=False)
    ratios = {x: naive.rms_ratio(np.asarray(results[x]), expected[x]) for x in expected}
    print(json.dumps(ratios))


if __name__ == "__main__":
    function, name, case = sys.argv[1:]
    globals()[function](hardware.find_gpu(name), CASES[int(case)])
