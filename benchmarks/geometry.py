"""Searches the kernels' block geometry on the GPU at hand, from the heuristic's choice.

Steps to the fastest neighbour until none is faster, and prints how far from the best the heuristic
is. What it finds can be given to `pallas_kernels.recurrence`, or become a rule of
`pallas_kernels/tuning.py`.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.measure.recurrence_timing import Shape, make_inputs, one_line
from benchmarks.measure.timing import ClockSampler, time_calls
from benchmarks.recurrence import NAMED
from experiments.harness import cli
from experiments.harness.cli import require
from pallas_kernels.geometry import Geometry
from pallas_kernels.tuning import backward_geometry, forward_geometry, neighbours


class Pass(NamedTuple):
    """A kernel whose geometry is searched."""

    choose: Callable[..., Geometry]
    argument: str
    """Of `pallas_kernels.recurrence`, that takes the geometry."""
    with_gradient: bool
    """Whether it is timed in a forward and backward pass, the others' geometries as chosen."""


PASSES = {
    "forward": Pass(forward_geometry, "forward_geometry", False),
    # It keeps what the backward pass reads.
    "forward-keeping": Pass(forward_geometry, "forward_geometry", True),
    # Of calls as they are timed here.
    "backward": Pass(
        functools.partial(backward_geometry, n_scalars=1, has_write_gate=False),
        "backward_geometry",
        True,
    ),
}


def milliseconds(
    shape: Shape,
    name: str,
    geometry: Geometry,
    options: argparse.Namespace,
    clock: ClockSampler,
) -> float | None:
    """Of one pass in a geometry, or None where it does not compile or fit."""
    run = functools.partial(
        pallas_kernels.recurrence,
        write_gate=None,
        initial_state=None,
        linear_state=False,
        saved_state_interval=options.saved_state_interval,
        **{PASSES[name].argument: geometry},
    )

    def forward(d_out: jax.Array, **arrays: jax.Array) -> Any:
        del d_out
        return run(**arrays)

    def forward_backward(d_out: jax.Array, **arrays: jax.Array) -> Any:
        _, pullback = jax.vjp(lambda arrays: run(**arrays)[0], arrays)
        return pullback(d_out)

    program = jax.jit(forward_backward if PASSES[name].with_gradient else forward)
    input_sets = [make_inputs(shape, options.dtype, jax.random.key(0))]
    try:
        return time_calls(program, input_sets, options.repetitions, clock)["ms"]
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        print(f"  {geometry}: {one_line(error)[:100]}", file=sys.stderr)
        return None


def search(
    shape: Shape, name: str, options: argparse.Namespace, clock: ClockSampler
) -> dict[Geometry, float]:
    """Milliseconds of every geometry tried; the heuristic's is the first."""
    n_sms = jax.devices()[0].core_count
    sizes = shape.B, shape.H, shape.N, shape.N, n_sms, jnp.dtype(options.dtype)
    geometry = PASSES[name].choose(*sizes)
    times: dict[Geometry, float] = {}
    tried: set[Geometry] = set()
    candidates = [geometry]
    while candidates and len(tried) < options.limit:
        for candidate in candidates[: options.limit - len(tried)]:
            tried.add(candidate)
            if (ms := milliseconds(shape, name, candidate, options, clock)) is not None:
                times[candidate] = ms
                print(f"{shape.name} {name} {ms:.3f} ms {candidate}", file=sys.stderr)
        if not times:
            break
        best = min(times, key=times.__getitem__)
        candidates = [x for x in neighbours(best) if x not in tried]
    return times


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Searches the kernels' block geometry on the GPU at hand, from the heuristic's "
        "choice, and prints how far from the best the heuristic is."
    )
    parser.add_argument("--shapes", nargs="+", default=list(NAMED), choices=NAMED, metavar="NAME")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--saved-state-interval", type=int, default=32, metavar="STEPS")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--limit", type=int, default=20, help="geometries tried for each pass of a shape"
    )
    options = parser.parse_args(args)
    try:
        require(options, "saved_state_interval", "repetitions", "limit", minimum=1)
    except ValueError as error:
        parser.error(str(error))
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, got {jax.default_backend()}.")
    rows = []
    with ClockSampler() as clock:
        for shape in (NAMED[x] for x in options.shapes):
            for name in options.passes:
                times = search(shape, name, options, clock)
                if not times:
                    rows.append(f"{shape.name:5} {name:15}  nothing compiled")
                    continue
                first, best = next(iter(times)), min(times, key=times.__getitem__)
                ratio = times[first] / times[best]
                rows.append(
                    f"{shape.name:5} {name:15} {times[first]:8.3f} ms, {ratio:.2f} x the best: "
                    f"{times[best]:.3f} ms with {dataclasses.astuple(best)}"
                )
    fields = ", ".join(field.name for field in dataclasses.fields(Geometry))
    print(f"the heuristic's time, and the best found, as ({fields})")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
