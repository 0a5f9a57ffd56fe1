"""Whether kernels that spill registers are faster than those that do not, on the GPU at hand.

Of each backward kernel that `compiled_kernels.py` has recorded with spills, the config that the
rules choose is timed, and others that leave a thread more registers or need fewer.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compiled_kernels import (
    FEW_BYTES,
    GPUS,
    RECORDED,
    ROWS,
    Case,
    Row,
    kernels_in,
    recurrence_program,
    sections,
    write_kernels,
)
from benchmarks.measure.flags import require_writable
from e88_jax import hardware
from experiments import cli
from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.markdown import Table
from pallas_kernels import target
from pallas_kernels.common.sizes import REGISTERS, THREADS
from pallas_kernels.limits import SAVED_STATE_GROUP
from pallas_kernels.target import Target

STEPS = 512
"""T of what is timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpillsConfig:
    """Time the backward kernels that spill registers, as other GPUs take them, against others that
    spill fewer, on the GPU at hand."""

    gpus: tuple[str, ...] = tuple(gpu for gpu in GPUS if gpu != "rtx3090")
    """GPUs whose kernels are timed, by their names in e88_jax.hardware; an RTX 3090 takes an RTX
    4090's."""
    json: Path | None = None
    """File to write the numbers to, as JSON."""
    repetitions: int = 9
    """Repetitions of a timing, whose tenth percentile is taken."""
    processes: int = 4
    """Processes that compile, side by side; one at a time uses the GPU."""
    part: int | None = None
    """Compile and time the candidates of this one of the processes, and print the numbers."""

    def __post_init__(self) -> None:
        require(self, "repetitions", "processes", minimum=1)
        for name in self.gpus:
            hardware.find_gpu(name)


class Candidate(NamedTuple):
    """A config for a kernel that spills."""

    kernel: Row
    """Its row in the record."""
    config: Any
    is_chosen: bool
    """Whether it is the config of the rules."""

    def blocks_of_an_sm(self, registers: int, gpu: Target) -> int:
        """Thread blocks that an SM holds, by its registers and its shared memory."""
        from pallas_kernels.common.launch import thread_blocks
        from pallas_kernels.recurrence.tuning import backward_shared_bytes

        size = self.kernel["size"]
        own = backward_shared_bytes(self.config, size, **_sizes(self.kernel))
        by_registers = REGISTERS // (THREADS * self.config.warpgroups * registers)
        return min(by_registers, thread_blocks(own, gpu))


class Timed(NamedTuple):
    """A candidate on the GPU at hand."""

    registers: int
    spilled_bytes: int
    ms: float


def candidates(kernels: Sequence[Row]) -> Iterator[Candidate]:
    """The configs that are timed, for each kernel of the record that spills; of two kernels that
    differ in nothing but options, for one."""
    seen: set[Any] = set()
    for kernel in kernels:
        if kernel.get("spilled_bytes", 0) <= FEW_BYTES or kernel["name"] != "e88_backward":
            continue
        chosen = _chosen(kernel)
        key = kernel["gpu"], kernel["size"], kernel["dtype"], kernel["rows"], chosen
        if key not in seen:
            seen.add(key)
            yield Candidate(kernel, chosen, True)
            yield from (Candidate(kernel, x, False) for x in _others(kernel, chosen))


def _sizes(kernel: Row) -> dict[str, Any]:
    """Arguments of the rules, batch and heads left out."""
    import jax.numpy as jnp

    every = kernel["every_option"]
    return {
        "dtype": jnp.dtype(kernel["dtype"]),
        "n_scalars": 4 if every else 1,
        "has_write_gate": every,
    }


def _chosen(kernel: Row) -> Any:
    from pallas_kernels.recurrence.tuning import backward_config

    (batch, _, heads), size = ROWS[kernel["rows"]], kernel["size"]
    gpu = hardware.find_gpu(kernel["gpu"]).target
    return backward_config(batch, heads, size, size, gpu, **_sizes(kernel))


def _others(kernel: Row, chosen: Any) -> Iterator[Any]:
    """One or two warpgroups fewer, other states in shared memory, half of the steps unrolled or of
    those of a chunk."""
    from pallas_kernels.common.launch import shared_memory_limit
    from pallas_kernels.recurrence.tuning import backward_shared_bytes, unrolled_steps
    from pallas_kernels.recurrence.tuning_config import STATES_HELD

    limit = shared_memory_limit(hardware.find_gpu(kernel["gpu"]).target)
    block = chosen.heads, chosen.values
    found = []
    for warpgroups in range(chosen.warpgroups, max(0, chosen.warpgroups - 3), -1):
        for states in STATES_HELD:
            config = dataclasses.replace(
                chosen,
                warpgroups=warpgroups,
                states_held=states,
                unroll=unrolled_steps(kernel["size"], block, states, kernel["dtype"]),
                pipelined=chosen.pipelined and states == STATES_HELD[0],
            )
            found.append(config)
    found.append(dataclasses.replace(chosen, unroll=max(1, chosen.unroll // 2)))
    if chosen.chunk > SAVED_STATE_GROUP:
        found.append(dataclasses.replace(chosen, chunk=chosen.chunk // 2))
    for config in dict.fromkeys(found):
        fits = backward_shared_bytes(config, kernel["size"], **_sizes(kernel)) <= limit
        if fits and config != chosen:
            yield config


_CANDIDATE, _COMPILED, _TIMED = "candidate: ", "compiled", "timed: "


def time_part(own: Sequence[tuple[int, Candidate]], repetitions: int) -> None:
    """Compiles, waits for a line of input, times; prints for `time_all`."""
    import jax

    from benchmarks.measure.recurrence_timing import CANNOT_RUN
    from benchmarks.measure.timing import ClockSampler, time_calls

    here = target.current()
    programs = {}
    for i, candidate in own:
        print(f"{_CANDIDATE}{i}", flush=True)
        with contextlib.suppress(*CANNOT_RUN):
            programs[i] = _compile(candidate, here)
    print(_COMPILED, flush=True)
    sys.stdin.readline()
    with ClockSampler() as clock:
        for i, (program, make_inputs) in programs.items():
            with contextlib.suppress(*CANNOT_RUN):
                inputs = make_inputs(jax.random.key(0))
                numbers = time_calls(program, [inputs], repetitions, clock)
                print(_TIMED + json.dumps([i, numbers["p10_ms"]]), flush=True)


def _compile(candidate: Candidate, here: Target) -> tuple[Any, Any]:
    """The program, and the one that makes its inputs."""
    import jax

    kernel, config, _ = candidate
    gpu = hardware.find_gpu(kernel["gpu"]).target
    batch, _, heads = ROWS[kernel["rows"]]
    if kernel["rows"] == "many":  # as many for an SM as there
        assert here.n_sms
        assert gpu.n_sms
        heads = round(heads * here.n_sms / gpu.n_sms)
    case = Case(**{name: kernel[name] for name in Case._fields})

    def array(*shape: int, dtype: Any = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    program, arguments, _ = recurrence_program(case, array, (batch, STEPS, heads), config)
    named = dict(zip(("arrays", "marks", "cotangents"), arguments, strict=True))
    make = functools.partial(_inputs, like=named)
    with target.use(dataclasses.replace(gpu, n_sms=here.n_sms)):
        compiled = jax.jit(program).lower(**named).compile()
    return compiled, jax.jit(make).lower(jax.random.key(0)).compile()


def _inputs(key: Any, like: Any) -> Any:
    """Numbers from 0 to 1 and True, in arrays of these shapes and dtypes."""
    import jax
    import jax.numpy as jnp

    def fill(x: Any) -> Any:
        if x.dtype == bool:
            return jnp.ones(x.shape, bool)
        return jax.random.uniform(key, x.shape).astype(x.dtype)

    return jax.tree.map(fill, like)


def time_all(n_candidates: int, options: SpillsConfig) -> dict[int, Timed]:
    """Each candidate that compiles and fits in memory."""
    flags = ["--processes", str(options.processes), "--repetitions", str(options.repetitions)]
    flags += ["--gpus", *options.gpus]
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def start(part: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.spills", "--part", str(part), *flags],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def compiled(process: subprocess.Popen[str]) -> list[str]:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if lines[-1] == _COMPILED:
                return lines
        raise UsageError(f"a process that compiles ended early: {(lines or ['no message'])[-1]}")

    with contextlib.ExitStack() as stack:
        workers = []
        for part in range(min(options.processes, n_candidates)):
            workers.append(stack.enter_context(start(part)))
            stack.callback(workers[-1].kill)
        with ThreadPoolExecutor(len(workers)) as threads:
            lines = [x for own in threads.map(compiled, workers) for x in own]
        compiled_to = {
            int(i): (kernel.registers, kernel.spilled_bytes)
            for i, of_candidate in sections(lines, _CANDIDATE)
            for kernel in kernels_in(of_candidate)
            if kernel.name == "e88_backward"
        }
        results: dict[int, Timed] = {}
        for worker in workers:
            said, _ = worker.communicate("go\n")
            for line in said.splitlines():
                if line.startswith(_TIMED):
                    i, ms = json.loads(line.removeprefix(_TIMED))
                    results[i] = Timed(*compiled_to[i], ms)
    return results


def compare(
    candidates: Sequence[Candidate], timed: dict[int, Timed], at_hand: Target
) -> Iterator[Row]:
    """For each kernel, what the config of the rules takes, and the fastest that spills little.

    What an SM of the GPU at hand holds more of than one of the kernel's GPU does not count, unless
    that is so of the config of the rules too.
    """
    starts = [i for i, x in enumerate(candidates) if x.is_chosen]
    for start, stop in zip(starts, [*starts[1:], len(candidates)], strict=True):
        kernel, config, _ = candidates[start]
        row = {name: kernel[name] for name in ("gpu", "size", "dtype", "rows", "every_option")}
        row |= {"spilled_bytes": kernel["spilled_bytes"], "config": dataclasses.asdict(config)}
        of_kernel = hardware.find_gpu(kernel["gpu"]).target

        def too_many(i: int, of_kernel: Target = of_kernel) -> bool:
            here, there = (
                candidates[i].blocks_of_an_sm(timed[i].registers, gpu)
                for gpu in (at_hand, of_kernel)
            )
            return here > there

        if start in timed:
            row["spilled_here"], row["ms"] = timed[start][1:]
            others = [
                (timed[i].ms, i)
                for i in range(start + 1, stop)
                if i in timed
                and timed[i].spilled_bytes <= FEW_BYTES
                and too_many(i) <= too_many(start)
            ]
            if others:
                row["ms_without"], best = min(others)
                row["config_without"] = dataclasses.asdict(candidates[best].config)
        yield row


def table(rows: Sequence[Row]) -> Table:
    """Header and rows, one for each GPU, from the entries of the file."""
    lines = []
    for key in dict.fromkeys(row["gpu"] for row in rows):
        own = [row for row in rows if row["gpu"] == key]
        ratios = [x["ms_without"] / x["ms"] for x in own if {"ms", "ms_without"} <= x.keys()]
        pays = sum(ratio > 1 for ratio in ratios)
        extremes = [f"{x:.2f}" for x in (max(ratios), min(ratios))] if ratios else ["-", "-"]
        counts = [str(n) for n in (len(own), len(ratios), pays)]
        lines.append([hardware.find_gpu(key).name, *counts, *extremes])
    header = [
        "GPU",
        "kernels that spill",
        "with others that do not",
        "faster",
        "at most",
        "at least",
    ]
    return header, lines


def main(args: Sequence[str]) -> None:
    """Parses, times, prints."""
    options = cli.parse(SpillsConfig, args)
    require_writable(options.json)
    if refusal := target.kernels_refusal(target.current()):
        raise UsageError(f"timing {refusal}.")
    recorded = json.loads(RECORDED.read_text())["kernels"]
    of_all = list(candidates([x for x in recorded if x["gpu"] in options.gpus]))
    if options.part is not None:
        own = list(enumerate(of_all))[options.part :: options.processes]
        time_part(own, options.repetitions)
        return
    rows = list(compare(of_all, time_all(len(of_all), options), target.current()))
    if options.json is not None:
        write_kernels(options.json, rows, device=target.current().name)
    for row in rows:
        print(" ".join(f"{name} {row[name]}" for name in row if "config" not in name))
    header, lines = table(rows)
    print(" | ".join(header))
    print("\n".join(" | ".join(line) for line in lines))


if __name__ == "__main__":
    cli.run(main)
