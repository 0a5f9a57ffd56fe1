"""Times a step of decoding on the GPU at hand: plain JAX, which the op takes at T = 1, or a kernel.

Many steps run in one program, each from the state that the one before left, so that the time to
launch a program does not count.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.measure.recurrence_timing import Shape, make_inputs
from benchmarks.measure.timing import ClockSampler, time_calls
from experiments import cli
from experiments.cli import require
from pallas_kernels import target
from pallas_kernels.recurrence import recurrence, single_step

WAYS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "plain JAX": single_step,
    "kernel": functools.partial(recurrence, saved_state_interval=32),
}


def make_program(step: Callable[..., tuple[Array, Array]]) -> Callable[..., Any]:
    """All steps of `[B, T, ...]`, one at a time; returns out and the last state."""

    @jax.jit
    def decode(d_out: Array, **arrays: Array) -> Any:
        del d_out
        batch, _, heads, n = arrays["q"].shape
        state = jnp.zeros((batch, heads, n, n), jnp.float32)

        def one(state: Array, x: dict[str, Array]) -> tuple[Array, Array]:
            x = {name: value[:, None] for name, value in x.items()}
            out, state = step(**x, write_gate=None, initial_state=state, linear_state=False)
            return state, out

        by_time = {name: jnp.moveaxis(x, 1, 0) for name, x in arrays.items()}
        return lax.scan(one, state, by_time)

    return decode


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="B")
    parser.add_argument("--heads", type=int, default=72, metavar="H")
    parser.add_argument("--n-state", type=int, default=32, metavar="N", help="and V")
    parser.add_argument("--steps", type=int, default=64, help="in one program")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(args)
    try:
        require(options, "batch", "heads", "n_state", "steps", "repetitions", minimum=1)
    except ValueError as error:
        parser.error(str(error))
    if (platform := target.current().platform) != "gpu":
        parser.error(f"needs a GPU, got {platform}.")
    print("microseconds a step:", *(f"{way:>10}" for way in WAYS))
    with ClockSampler() as clock:
        for batch in options.batch:
            shape = Shape(f"B={batch}", batch, options.steps, options.heads, options.n_state)
            inputs = [make_inputs(shape, options.dtype, jax.random.key(0))]
            ms = [
                time_calls(make_program(step), inputs, options.repetitions, clock)["ms"]
                for step in WAYS.values()
            ]
            print(f"{shape.name:>19}:", *(f"{1e3 * x / options.steps:10.2f}" for x in ms))
    return 0


if __name__ == "__main__":
    cli.run(main)
