"""Searches the kernels' tuning configs on the GPU at hand, from the heuristic's choice.

It moves to the fastest neighbour until none is faster, and prints how far from the best the
heuristic is. The best can be passed to `pallas_kernels.recurrence.recurrence`, or become a rule of
`pallas_kernels/recurrence/tuning.py`.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.measure.recurrence_timing import Shape, make_inputs, one_line
from benchmarks.measure.timing import ClockSampler, time_calls
from benchmarks.recurrence import NAMED
from experiments import cli
from experiments.cli import require
from pallas_kernels import target
from pallas_kernels.recurrence import TuningConfig, recurrence
from pallas_kernels.recurrence.tuning import backward_config, forward_config, neighbours


class Pass(NamedTuple):
    """A kernel whose config is searched."""

    choose: Callable[..., TuningConfig]
    argument: str
    """The argument of `recurrence` that takes the config."""
    with_gradient: bool
    """Whether forward + backward is timed, with the heuristic's configs for the other kernels."""


PASSES = {
    "forward": Pass(forward_config, "forward_config", False),
    # The forward pass that saves what the backward pass reads.
    "forward-keeping": Pass(forward_config, "forward_config", True),
    # Calls as they are timed here.
    "backward": Pass(
        functools.partial(backward_config, n_scalars=1, has_write_gate=False),
        "backward_config",
        True,
    ),
}


def milliseconds(
    shape: Shape,
    name: str,
    config: TuningConfig,
    options: argparse.Namespace,
    clock: ClockSampler,
) -> float | None:
    """Time of one pass with a config, or None where it does not compile or fit."""
    run = functools.partial(
        recurrence,
        write_gate=None,
        initial_state=None,
        linear_state=False,
        saved_state_interval=options.saved_state_interval,
        **{PASSES[name].argument: config},
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
        print(f"  {config}: {one_line(error)[:100]}", file=sys.stderr)
        return None


def search(
    shape: Shape, name: str, options: argparse.Namespace, clock: ClockSampler
) -> dict[TuningConfig, float]:
    """Milliseconds of every config tried; the heuristic's is the first."""
    sizes = shape.B, shape.H, shape.N, shape.N, target.current(), jnp.dtype(options.dtype)
    config = PASSES[name].choose(*sizes)
    times: dict[TuningConfig, float] = {}
    tried: set[TuningConfig] = set()
    candidates = [config]
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
        description="Searches the kernels' tuning configs on the GPU at hand, from the heuristic's "
        "choice, and prints how far from the best the heuristic is."
    )
    parser.add_argument("--shapes", nargs="+", default=list(NAMED), choices=NAMED, metavar="NAME")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--saved-state-interval", type=int, default=32, metavar="STEPS")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--limit", type=int, default=20, help="configs tried for each pass of a shape"
    )
    options = parser.parse_args(args)
    try:
        require(options, "saved_state_interval", "repetitions", "limit", minimum=1)
    except ValueError as error:
        parser.error(str(error))
    if refusal := target.kernels_refusal(target.current()):
        parser.error(f"{refusal}.")
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
    fields = ", ".join(field.name for field in dataclasses.fields(TuningConfig))
    print(f"the heuristic's time, and the best found, as ({fields})")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
