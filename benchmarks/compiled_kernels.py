"""Registers and spills of the kernels on GPUs that need not be there.

The kernels are compiled, not run: no GPU is needed, only JAX 0.11 or later with its CUDA plugin, as
in `jax[cuda13]`.
"""

import collections
import dataclasses
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.measure.described_gpu import compiling_for
from benchmarks.measure.flags import require_writable
from e88_jax import hardware
from e88_jax.mixers.base import DTYPE_BYTES
from experiments import cli
from experiments.cli.errors import UsageError
from experiments.harness.run_directory import commit, versions
from experiments.markdown import Table
from pallas_kernels.common.sizes import round_up
from pallas_kernels.limits import DTYPES, MAX_SIZE, SIZE_MULTIPLE, takes_size

GPUS = "a100-80gb", "rtx3090", "rtx4090", "h100", "b200", "rtx5090"
"""One of each compute capability from 8.0 to 12.0."""
SIZES = 4, 8, 16, 20, 24, 32, 40, 48, 56, 64, 72, 80, 96, 100, 120, 128
"""N = V of the recurrence."""
ROWS = {"many": (8, 2048, 72), "few": (1, 2048, 8)}
"""B, T and H: more blocks than the SMs hold at once, and fewer than SMs."""
FEW_BYTES = 16
"""Bytes of registers that a thread may spill at little cost."""
LAYERS = 16, 32, 64, 128
"""N = V of the other kernels."""
RECORDED = Path(__file__).parent / "results" / "compiled_kernels.json"

Row: TypeAlias = dict[str, Any]
"""A kernel, or a program that is refused, as in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernelsConfig:
    """Compile the kernels for GPUs that need not be there, and list registers and spills."""

    gpus: tuple[str, ...] = GPUS
    """GPUs, by their names in e88_jax.hardware."""
    sizes: tuple[int, ...] = SIZES
    """N = V of the recurrence's kernels; of the others 16, 32, 64 and 128 among them."""
    json: Path | None = None
    """File to write the numbers to, as JSON."""
    check: bool = False
    """Exit with an error if a kernel is refused, or spills more than 16 bytes and more than in
    benchmarks/results/compiled_kernels.json."""
    listed: bool = False
    """Compile for the only one of --gpus in this process, and print what the compiler says."""

    def __post_init__(self) -> None:
        for name in self.gpus:
            hardware.find_gpu(name)
        if self.listed and len(self.gpus) != 1:
            raise ValueError(f"--listed is for one of --gpus, got {len(self.gpus)}.")
        for size in self.sizes:
            if not takes_size(size):
                raise ValueError(
                    f"--sizes are multiples of {SIZE_MULTIPLE} up to {MAX_SIZE}, got {size}."
                )


class Case(NamedTuple):
    """One program, of one or two kernels."""

    kernel: str
    """"recurrence", "qkv_activation" or "decode"."""
    size: int
    """N = V."""
    dtype: str
    rows: str = "many"
    """A key of `ROWS`."""
    every_option: bool = False
    """Whether the recurrence has write gate, initial state, documents and short rows."""


class Compiled(NamedTuple):
    """One kernel by the compiler's report."""

    name: str
    registers: int
    spilled_bytes: int
    """Stored, of each thread."""


def cases(sizes: Sequence[int]) -> Iterator[Case]:
    """All programs that are compiled for a GPU; no two have the same kernels, which JAX 0.12
    compiles once."""
    seen: set[tuple[str, int]] = set()
    for size in sizes:
        for dtype in DTYPES:
            row = round_up(size * DTYPE_BYTES[dtype], 16)  # as the kernels take it
            if (dtype, row) in seen:
                continue
            seen.add((dtype, row))
            for rows in ROWS:
                for every_option in (False, True):
                    yield Case("recurrence", size, dtype, rows, every_option)
            if size in LAYERS:
                yield Case("qkv_activation", size, dtype)
                yield Case("decode", size, dtype)


def lower(case: Case, sharding: Any) -> Any:
    """The program of a case, inside of `compiling_for`, to be compiled.

    Raises:
        NotImplementedError: the kernels do not take it.
    """
    import jax

    def array(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    of_kernel = {
        "recurrence": recurrence_program,
        "qkv_activation": _activation,
        "decode": _decoding,
    }
    program, arguments, options = of_kernel[case.kernel](case, array)
    traced = jax.jit(program, **options).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",))


def recurrence_program(
    case: Case, array: Any, rows: tuple[int, int, int] | None = None, backward_config: Any = None
) -> Any:
    """The recurrence and its gradient: program, arguments and options of `jax.jit`.

    Args:
        array: makes an argument from its shape and dtype.
        rows: B, T and H; those of the case by default.
        backward_config: tuning config of the backward kernel; that of the rules by default.
    """
    import jax

    from pallas_kernels.recurrence import recurrence

    (batch, time, heads), size = rows or ROWS[case.rows], case.size
    q = array(batch, time, heads, size, dtype=case.dtype)
    decay, state = array(batch, time, heads), array(batch, heads, size, size)
    marks = array(batch, time, dtype="bool")
    gate, initial, starts, live = (decay, state, marks, marks) if case.every_option else (None,) * 4

    def both(arrays: dict[str, Any], marks: dict[str, Any], cotangents: Any) -> Any:
        def run(arrays: dict[str, Any]) -> Any:
            return recurrence(
                **arrays,
                **marks,
                linear_state=False,
                saved_state_interval=32,
                backward_config=backward_config,
            )

        results, pullback = jax.vjp(run, arrays)
        return results, pullback(cotangents)

    arrays = {"q": q, "k": q, "v": q, "decay": decay, "write_gate": gate, "initial_state": initial}
    return both, (arrays, {"starts": starts, "live": live}, (q, state)), {}


def _activation(case: Case, array: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.qkv_activation import HeadColumns, activate

    batch, time, heads = ROWS[case.rows]
    columns = HeadColumns(heads, case.size, case.size, silu=True, unit_length=True)

    def loss(y: Any) -> Any:
        return sum(jnp.sum(x, dtype=jnp.float32) for x in activate(columns, y))

    y = array(batch, time, columns.n_columns, dtype=case.dtype)
    return jax.value_and_grad(loss), (y,), {}


def _decoding(case: Case, array: Any) -> Any:
    from pallas_kernels.decode import DecodeConfig, decode_layer
    from pallas_kernels.qkv_activation import HeadColumns

    (batch, _, heads), size = ROWS[case.rows], case.size
    columns = HeadColumns(heads, size, size, silu=True, unit_length=True)
    config = DecodeConfig(columns, "silu", columns.n_columns, linear_state=False)

    def decode(*arguments: Any) -> Any:
        return decode_layer(config, *arguments)

    x = array(batch, columns.n_columns + heads * size, dtype=case.dtype)
    decay, state = array(batch, heads), array(batch, heads, size, size)
    return decode, (x, decay, decay, state), {"donate_argnums": 3}


_CASE, _REFUSED, _FAILED = "case: ", "refused: ", "failed: "


def compile_all(gpu: hardware.GPU, sizes: Sequence[int]) -> None:
    """Compiles all cases; prints each before the compiler's own lines, for `read`."""
    import jax

    with compiling_for(gpu.target) as (device,):
        sharding = jax.sharding.SingleDeviceSharding(device)
        for case in cases(sizes):
            print(_CASE + json.dumps(case), flush=True)
            try:
                lower(case, sharding).compile()
            except NotImplementedError as error:
                print(f"{_REFUSED}{error}", flush=True)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                print(f"{_FAILED}{str(error).partition(chr(10))[0]}", flush=True)


def read(lines: Sequence[str]) -> dict[Case, list[Compiled] | str]:
    """Kernels of each case in the output of `compile_all`, or "refused: ..." or "failed: ..."."""
    found: dict[Case, list[Compiled] | str] = {}
    for case, of_case in sections(lines, _CASE):
        why = [line for line in of_case if line.startswith((_REFUSED, _FAILED))]
        found[Case(*json.loads(case))] = why[-1] if why else kernels_in(of_case)
    return found


def sections(lines: Sequence[str], title: str) -> Iterator[tuple[str, list[str]]]:
    """Pairs of the rest of each line that starts with `title` and the lines up to the next one."""
    starts = [i for i, line in enumerate(lines) if line.startswith(title)]
    for start, stop in itertools.pairwise([*starts, len(lines)]):
        yield lines[start].removeprefix(title), [*lines[start + 1 : stop]]


def kernels_in(lines: Sequence[str]) -> list[Compiled]:
    """The kernels of a program by the compiler's report (`MOSAIC_GPU_DUMP_PTXAS=1`)."""
    kernels: list[Compiled] = []
    name, spilled = "", 0
    for line in lines:
        if match := re.search(r"Compiling entry function '(\w+?)(?:_mosaic_gpu\w*)?'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, \d+ bytes spill loads$", line):
            spilled = int(match[1])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels.append(Compiled(name, int(match[1]), spilled))
    return kernels


def compiled_for(gpu: hardware.GPU, sizes: Sequence[int]) -> dict[Case, list[Compiled] | str]:
    """The cases on a GPU, compiled in another process, as the compiler writes past Python.

    Raises:
        UsageError: it ended early.
    """
    flags = ["--gpus", gpu.key, "--sizes", *map(str, sizes), "--listed"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_kernels", *flags],
        env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        last = next((x for x in reversed(lines) if "rror" in x), (lines or ["no message"])[-1])
        raise UsageError(f"compiling for {gpu.name} ended with {done.returncode}: {last}")
    return read(lines)


def write_kernels(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """Writes a file of kernels, one to a line, after `about`, commit, date and versions."""
    about |= {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "kernels": [\n{lines}\n ]\n}}\n')


def main(args: Sequence[str]) -> None:
    """Parses, compiles, prints."""
    config = cli.parse(CompiledKernelsConfig, args)
    require_writable(config.json)
    gpus = [hardware.find_gpu(name) for name in config.gpus]
    if config.listed:
        compile_all(gpus[0], config.sizes)
        return
    # Before --json may write the same file.
    recorded = json.loads(RECORDED.read_text()) if config.check else None
    from rich.console import Console
    from rich.progress import track

    rows: list[Row] = []
    for gpu in track(gpus, "compiling", console=Console(stderr=True)):
        for case, kernels in compiled_for(gpu, config.sizes).items():
            about = {"gpu": gpu.key, **case._asdict()}
            if isinstance(kernels, str):
                outcome, _, why = kernels.partition(": ")
                rows.append(about | {outcome: why})
                continue
            rows += [about | kernel._asdict() for kernel in kernels]
        print(_summary(gpu, [row for row in rows if row["gpu"] == gpu.key]), flush=True)
    if config.json is not None:
        write_kernels(config.json, rows)
    if failed := [row for row in rows if "failed" in row]:
        first = ", ".join(str(x) for x in failed[0].values())
        raise UsageError(f"{len(failed)} programs were not compiled, the first: {first}")
    if recorded is not None and (worse := worse_than(recorded["kernels"], rows)):
        by = f"JAX {versions()['jax']}, recorded with {recorded['versions']['jax']}"
        lines = "\n".join(worse)
        raise UsageError(
            f"{len(worse)} kernels or programs are worse than recorded ({by}):\n{lines}"
        )


def worse_than(recorded: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """A line for each program that is refused now only, and each kernel that spills more, if more
    than `FEW_BYTES`, or that the compiler's report lacks though its GPU and size were compiled."""

    def about(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("gpu", *Case._fields, "name"))

    before = {about(row): row for row in recorded}
    worse = []
    for row in rows:
        was = before.get(about(row), {})
        words = " ".join(str(x) for x in about(row) if x is not None)
        spilled, most = row.get("spilled_bytes", 0), max(FEW_BYTES, was.get("spilled_bytes", 0))
        if "refused" in row and "refused" not in was:
            worse.append(f"{words}: refused, {row['refused']}")
        elif spilled > most:
            worse.append(f"{words}: spills {spilled} bytes, more than {most}")
    reported = {about(row) for row in rows}
    refused = {about(row)[:-1] for row in rows if "refused" in row}
    compiled = {(row["gpu"], row["size"]) for row in rows}
    for key, row in before.items():
        expected = "name" in row and (row["gpu"], row["size"]) in compiled
        if expected and key not in reported and key[:-1] not in refused:
            worse.append(f"{' '.join(map(str, key))}: not in the compiler's report")
    return worse


def table(kernels: Sequence[Row]) -> Table:
    """Header and rows, one for each GPU, from the entries of the file."""
    rows = []
    for key in dict.fromkeys(kernel["gpu"] for kernel in kernels):
        gpu, own = hardware.find_gpu(key), [x for x in kernels if x["gpu"] == key]
        spilled = [x["spilled_bytes"] for x in own if "name" in x]
        capability = ".".join(map(str, gpu.compute_capability))
        many = sum(n > FEW_BYTES for n in spilled)
        counts = len(spilled), sum("refused" in x for x in own), many, max(spilled, default=0)
        rows.append([gpu.name, capability, *map(str, counts)])
    header = ["GPU", "compute capability", "kernels", "programs refused"]
    return [*header, f"spill more than {FEW_BYTES} bytes", "most bytes spilled"], rows


def _summary(gpu: hardware.GPU, rows: list[Row]) -> str:
    """Kernels, refusals and spills on a GPU."""
    compiled = [row for row in rows if "name" in row]
    refused = collections.Counter(row["refused"] for row in rows if "refused" in row)
    spilled = [row for row in compiled if row["spilled_bytes"]]
    lines = [
        f"{gpu.name}: {len(compiled)} kernels, {len(spilled)} of them with spills, "
        f"{refused.total()} programs refused"
    ]
    for row in sorted(spilled, key=lambda row: -row["spilled_bytes"]):
        options = ", every option" if row["every_option"] else ""
        lines.append(
            f"  {row['spilled_bytes']:4} bytes, {row['registers']} registers: {row['name']}, "
            f"N = V = {row['size']}, {row['dtype']}, {row['rows']} rows{options}"
        )
    return "\n".join([*lines, *(f"  {n} refused: {why}" for why, n in refused.items())])


if __name__ == "__main__":
    cli.run(main)
