"""Times the recurrence on a GPU: forward and gradient, against the tanh limit and the scan.

The tanh limit is the time that `tanh.approx.f32` alone takes, one for each element of the state at
each step, at the clock read while timing. The backward pass recomputes the states, so its limit is
the same.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax

from benchmarks.measure.flags import require_writable
from benchmarks.measure.recurrence_timing import Shape, compile_passes, time_passes
from benchmarks.measure.timing import ClockSampler, Numbers
from e88_jax import hardware
from e88_jax.recurrence import Implementation, e88_recurrence
from experiments import cli
from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.harness.run_directory import commit
from pallas_kernels import limits, target

TANH_PER_CYCLE = 16
"""tanh per cycle of one SM on an H100 or H200: CUDA C++ Programming Guide, throughput of arithmetic
instructions."""
SCAN_REPETITIONS = 3

NAMED = {
    shape.name: shape
    for shape in (
        Shape("A", 8, 2048, 72, 32),
        Shape("B", 8, 512, 384, 32),
        Shape("C", 1, 2048, 72, 32),
        Shape("D", 8, 2048, 40, 64),
        Shape("E", 4, 2048, 16, 128),
        Shape("F", 8, 2048, 48, 48),
    )
}
# About as many elements of state as A has, whatever N.
SWEEP = {
    n: Shape(f"N={n}", 8, 2048, max(1, round(72 * 32 * 32 / n**2)), n)
    for n in (16, 32, 48, 64, 72, 96, 128)
}


class Job(NamedTuple):
    """A shape, by kernels as a target takes them."""

    shape: Shape
    target: target.Target
    as_gpu: str | None
    """Key of the GPU that the target is of; None for the one at hand."""


def time_all(
    jobs: Sequence[Job], options: argparse.Namespace, clock: ClockSampler
) -> list[Numbers]:
    """One entry for each job: sizes, and numbers of each pass. All are compiled first, at once."""
    named: Implementation = options.implementation
    implementations = dict.fromkeys((named, "scan") if options.scan else (named,))

    def compiled(job: Job, implementation: Implementation) -> Any:
        recurrence = functools.partial(
            e88_recurrence,
            implementation=implementation,
            saved_state_interval=options.saved_state_interval,
        )
        with target.use(job.target):
            return compile_passes(recurrence, job.shape, options.dtype)

    with ThreadPoolExecutor() as threads:
        programs = [
            {name: threads.submit(compiled, job, name) for name in implementations} for job in jobs
        ]
    device = jax.devices()[0]
    sm_count = device.core_count if device.platform == "gpu" else None
    measured = []
    for job, by in zip(jobs, programs, strict=True):
        time_by = functools.partial(_time, job, dtype=options.dtype, clock=clock)
        passes, error = time_by(named, by[named], repetitions=options.repetitions)
        add_rates(job.shape, passes, sm_count)
        entry = {**dataclasses.asdict(job.shape), "V": job.shape.N, "elements": job.shape.elements}
        entry |= {} if job.as_gpu is None else {"as_gpu": job.as_gpu}
        measured.append({**entry, "passes": passes, "error": error})
        if passes and named != "scan" and "scan" in by:
            by_scan, error = time_by("scan", by["scan"], repetitions=SCAN_REPETITIONS)
            measured[-1]["scan_error"] = error
            for name in passes.keys() & by_scan.keys():
                passes[name]["scan_ms"] = by_scan[name]["ms"]
                ratio = by_scan[name]["ms"] / passes[name]["ms"]
                passes[name]["times_faster_than_scan"] = round(ratio, 3)
    sweep = {
        (entry.get("as_gpu"), entry["N"]): entry["passes"]
        for entry in measured
        if entry["name"] == f"N={entry['N']}"
    }
    for (as_gpu, _), passes in sweep.items():
        of_32 = sweep.get((as_gpu, 32), {})
        for name in passes.keys() & of_32.keys():
            ratio = passes[name]["ps_per_element"] / of_32[name]["ps_per_element"]
            passes[name]["times_n32"] = round(ratio, 3)
    return measured


def _time(
    job: Job,
    implementation: Implementation,
    program: Future[Any],
    *,
    dtype: str,
    repetitions: int,
    clock: ClockSampler,
) -> tuple[dict[str, Numbers], str | None]:
    """Numbers of each pass, and what stopped those that are missing."""

    def say(line: str) -> None:
        by = implementation if job.as_gpu is None else f"{implementation} as {job.as_gpu}"
        print(f"{job.shape.name} {by} {line}", file=sys.stderr)

    return time_passes(program.result(), job.shape, dtype, repetitions, clock, say)


def tanh_limit_ms(elements: int, sm_count: int, clock_mhz: float) -> float:
    """Milliseconds of one tanh for each element."""
    return elements / (sm_count * TANH_PER_CYCLE * clock_mhz * 1e6) * 1e3


def add_rates(shape: Shape, passes: dict[str, Numbers], sm_count: int | None) -> None:
    """Puts into each pass its rates and its ratio to the tanh limit."""
    for name, numbers in passes.items():
        numbers["tokens_per_second"] = round(shape.B * shape.T / numbers["ms"] * 1e3)
        numbers["ps_per_element"] = round(numbers["ms"] * 1e9 / shape.elements, 4)
        if sm_count is not None and numbers["clock_mhz"] is not None:
            tanhs = shape.elements * (2 if name == "forward+backward" else 1)
            limit = tanh_limit_ms(tanhs, sm_count, numbers["clock_mhz"])
            numbers["tanh_limit_ms"] = round(limit, 6)
            numbers["times_tanh_limit"] = round(numbers["ms"] / limit, 3)


def table(shapes: list[Numbers]) -> str:
    """One row for each shape and pass."""
    header = ("shape", "B", "T", "H", "N", "pass", "ms", "p10", "p90", "Mtoken/s", "MHz")
    header += ("x tanh limit", "ps/element", "x N=32", "scan ms", "x faster")
    columns = (
        ("ms", ".3f", 1.0),
        ("p10_ms", ".3f", 1.0),
        ("p90_ms", ".3f", 1.0),
        ("tokens_per_second", ".3f", 1e-6),
        ("clock_mhz", ".0f", 1.0),
        ("times_tanh_limit", ".2f", 1.0),
        ("ps_per_element", ".3f", 1.0),
        ("times_n32", ".2f", 1.0),
        ("scan_ms", ".2f", 1.0),
        ("times_faster_than_scan", ".1f", 1.0),
    )
    rows: list[tuple[str, ...]] = [header]
    for shape in shapes:
        name = " as ".join(shape[key] for key in ("name", "as_gpu") if key in shape)
        sizes = [name, *(str(shape[key]) for key in "BTHN")]
        for name, numbers in shape["passes"].items():
            values = [(numbers.get(key), spec, unit) for key, spec, unit in columns]
            cells = ["-" if x is None else format(unit * x, spec) for x, spec, unit in values]
            rows.append((*sizes, name, *cells))
            sizes = [""] * len(sizes)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {header.index("shape"), header.index("pass")}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Times e88_jax.recurrence.e88_recurrence on the GPU at hand: forward, forward "
        "with the gradients of every input, and the difference as backward.",
        epilog="Without --shapes, --shape or --sweep, times every named shape and the sweep.",
    )
    named = ", ".join(f"{x.name} ({x.B}, {x.T}, {x.H}, {x.N})" for x in NAMED.values())
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        choices=NAMED,
        metavar="NAME",
        help=f"by name, (B, T, H, N = V): {named}",
    )
    parser.add_argument(
        "--shape", action="append", default=[], type=_shape, metavar="B,T,H,N", help="any other"
    )
    parser.add_argument(
        "--sweep",
        action=argparse.BooleanOptionalAction,
        help=f"N of {', '.join(map(str, SWEEP))} at about as many elements of state as A",
    )
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the scan too, for the ratio (slow)",
    )
    parser.add_argument(
        "--implementation", default="mosaic_gpu", choices=get_args(Implementation), help="to time"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--as-gpu",
        nargs="+",
        default=[],
        choices=[gpu.key for gpu in hardware.GPUS],
        help="time the kernels as other GPUs take them, by their copies and shared memory, on the "
        "GPU at hand",
    )
    parser.add_argument(
        "--async-copies",
        action="store_true",
        help="copy by cp.async, as on GPUs before Hopper, also where there are bulk copies",
    )
    parser.add_argument("--saved-state-interval", type=int, default=32, metavar="STEPS")
    parser.add_argument(
        "--repetitions", type=int, default=20, help="of which the median and p10, p90 are taken"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")
    options = parser.parse_args(args)
    try:
        require(options, "saved_state_interval", "repetitions", minimum=1)
        require_writable(options.json)
    except (ValueError, UsageError) as error:
        parser.error(str(error))
    return options


def _targets(options: argparse.Namespace) -> dict[str | None, target.Target]:
    """The devices that kernels are built for: those of --as-gpu, else the one at hand."""
    here = target.current()
    others = {
        key: dataclasses.replace(hardware.find_gpu(key).target, n_sms=here.n_sms)
        for key in options.as_gpu
    }
    return {
        key: dataclasses.replace(built_for, compute_capability=limits.MIN_COMPUTE_CAPABILITY)
        if options.async_copies and built_for.has_bulk_copies
        else built_for
        for key, built_for in (others or {None: here}).items()
    }


def _shape(text: str) -> Shape:
    try:
        B, T, H, N = (int(size) for size in text.split(","))
    except ValueError:
        message = f"expected B,T,H,N, such as 8,2048,72,32, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    if min(B, T, H, N) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be at least 1, got {text!r}")
    return Shape(text, B, T, H, N)


def main(args: Sequence[str] | None = None) -> int:
    """Times, prints, records; returns 1 if a shape could not be timed."""
    options = parse(args)
    shapes = [*(NAMED[name] for name in options.shapes), *options.shape]
    if not shapes and not options.sweep:
        shapes = [*NAMED.values()]
        options.sweep = options.sweep is None
    shapes += SWEEP.values() if options.sweep else []

    jobs = [Job(x, built_for, key) for key, built_for in _targets(options).items() for x in shapes]
    with ClockSampler() as clock:
        measured = time_all(jobs, options, clock)
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "driver": clock.query("driver_version"),
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "implementation": options.implementation,
        "dtype": options.dtype,
        "saved_state_interval": options.saved_state_interval,
        "repetitions": options.repetitions,
    }
    if options.async_copies:
        about["copies"] = "cp.async"
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "shapes": measured}, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(measured))
    if any(numbers["clock_mhz"] is None for x in measured for numbers in x["passes"].values()):
        print("nvidia-smi gave no clock: no ratio to the tanh limit.")
    errors = [
        f"{entry['name']}: {entry[key]}"
        for entry in measured
        for key in ("error", "scan_error")
        if entry.get(key) is not None
    ]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    cli.run(main)
