"""Times the training step over the GPUs of a host: tokens/s, efficiency, communication."""

import dataclasses
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import train_step
from benchmarks.measure.flags import parse_with_preset, require_writable
from benchmarks.measure.gpu_profile import COMMUNICATION
from benchmarks.recorded import percent
from experiments import cli, markdown
from experiments.cli import require
from experiments.cli.errors import UsageError, warn
from experiments.harness.launch import visible_gpus
from experiments.harness.mesh_sizes import MeshSizes, check_model


class Load(NamedTuple):
    """Batch of a GPU, the same on every number of GPUs."""

    rows: int
    """Rows of a GPU; all GPUs along `heads` have the same."""
    seq_len: int
    axes: tuple[str, ...]
    """Mesh axes to time, one at a time."""
    min_gpus: int = 1
    """Fewest GPUs whose memory holds weights and optimizer state."""
    time_chunks: tuple[int, ...] = (1,)
    """Chunks of time that each is timed with."""


class Model(NamedTuple):
    """A model and what is timed of it."""

    flags: str
    loads: tuple[Load, ...]

    @property
    def min_gpus(self) -> int:
        return min(load.min_gpus for load in self.loads)

    def along(self, axes: Sequence[str]) -> "Model":
        """The model with only the loads of these mesh axes."""
        loads = [x._replace(axes=tuple(a for a in x.axes if a in axes)) for x in self.loads]
        return self._replace(loads=tuple(load for load in loads if load.axes))

    def divides(self, axis: str, n: int) -> bool:
        """Whether n GPUs along this axis divide its dim or heads."""
        config = parse_with_preset(train_step.BenchmarkConfig, self.flags.split()).model
        try:
            check_model(MeshSizes(**{axis: n}), config)
        except UsageError:
            return False
        return True


ROWS, LONG_ROW = ("data", "fsdp"), Load(1, 8192, ("heads",), time_chunks=(1, 2))
MODELS = {
    "500M": Model("--preset h72n32-500m", (Load(16, 2048, ROWS), LONG_ROW)),
    "1B": Model("--preset h96n32-1b", (Load(8, 2048, ROWS), LONG_ROW)),
    # Models of `python -m e88_jax.sizing 3B --gpu h100`, likewise 7B, of n_state 32. Of 7B 8 x 2048
    # a GPU needs the memory of an H200.
    "3B": Model(
        "--dim 4416 --n-heads 136 --n-state 32 --depth 31 --remat recurrence",
        (Load(4, 2048, ROWS), LONG_ROW),
    ),
    "7B": Model(
        "--dim 5440 --n-heads 170 --n-state 32 --depth 47 --remat recurrence",
        (
            Load(4, 2048, ("fsdp",), min_gpus=4),
            Load(8, 2048, ("fsdp",), min_gpus=4),
            LONG_ROW._replace(min_gpus=2),
        ),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Time the training step of train_byte_lm.py on random bytes over several GPUs of this host,
    and compare with one GPU: each GPU with as many rows along data and fsdp, all with the same row
    and a part of the heads along heads. Each point is a process of its own.

    Efficiency is the tokens/s of a GPU over those of the same model on one GPU without chunks of
    time, which must be of the same kind, versions and commit: a file holds the points of one
    machine. A model that one GPU cannot hold has none.
    """

    models: tuple[str, ...] = tuple(MODELS)
    """Models by their parameters."""
    gpus: tuple[int, ...] = ()
    """Numbers of GPUs; none for 1, 2, 4, ... up to those that are there."""
    axes: tuple[str, ...] = MeshSizes._fields
    """Mesh axes to time, each beside one GPU with the same rows."""
    repeats: int = train_step.REPEATS
    """Steps timed, after two that are not."""
    missing: bool = False
    """Leave out the points that the file of --json has, but for those that failed."""
    json: Path | None = None
    """File to write the numbers to, as JSON; other points that it has are kept."""
    plot: Path | None = None
    """PNG to draw efficiency to."""

    def __post_init__(self) -> None:
        require(self, "gpus", "repeats", minimum=1)
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"--models are {', '.join(MODELS)}, got {', '.join(unknown)}.")
        if not self.axes:
            raise ValueError(f"--axes needs one of {', '.join(MeshSizes._fields)}.")
        if unknown := [axis for axis in self.axes if axis not in MeshSizes._fields]:
            axes = ", ".join(MeshSizes._fields)
            raise ValueError(f"--axes are {axes}, got {', '.join(unknown)}.")
        if self.missing and self.json is None:
            raise ValueError("--missing is for --json.")


class Point(NamedTuple):
    """A model on GPUs along one axis of a mesh."""

    model: str
    rows: int
    """Rows of a GPU."""
    seq_len: int
    axis: str
    n: int
    """GPUs."""
    time_chunks: int = 1

    def __str__(self) -> str:
        """The name in files."""
        return f"{self.model}, {self.rows} x {self.seq_len} a GPU, {self.sizes}{self._chunks}"

    @property
    def sizes(self) -> MeshSizes:
        return MeshSizes(**{self.axis: self.n})

    @property
    def batch(self) -> str:
        """Rows, tokens and chunks in tables."""
        return f"{self.rows} x {self.seq_len}{self._chunks}"

    @property
    def _chunks(self) -> str:
        return "" if self.time_chunks == 1 else f", {self.time_chunks} chunks"

    @property
    def on_one_gpu(self) -> "Point":
        """The same on one GPU."""
        return self._replace(axis="data", n=1)

    @property
    def base(self) -> "Point":
        """The point that it is compared with: on one GPU, without chunks."""
        return self.on_one_gpu._replace(time_chunks=1)

    @classmethod
    def of(cls, name: str) -> "Point":
        """The point of this name.

        Raises:
            ValueError: there is no such point.
        """
        axes = "|".join(MeshSizes._fields)
        pattern = rf"([^,]+), (\d+) x (\d+) a GPU, ({axes})=(\d+)(?:, (\d+) chunks)?"
        match = re.fullmatch(pattern, name)
        if match is None:
            raise ValueError(f"{name!r} is no point of scaling.py.")
        model, rows, seq_len, axis, n, chunks = match.groups()
        return cls(model, int(rows), int(seq_len), axis, int(n), int(chunks or 1))


def main(args: Sequence[str]) -> None:
    """Parses, times each point, prints the table."""
    config = cli.parse(ScalingConfig, args)
    require_writable(config.json)
    require_writable(config.plot)
    for name in train_step.recorded_points(config.json):
        try:
            Point.of(name)
        except ValueError as error:
            raise UsageError(f"--json {config.json}: {error}") from None
    flags = {
        str(x): flags_of(x, config.repeats) for x in points_of(config, visible_gpus(os.environ))
    }
    points = train_step.time_points(flags, config.json, missing=config.missing)
    print("\n" + markdown.table(*table(points)))
    if config.plot is not None:
        draw(points, config.plot)


def points_of(config: ScalingConfig, n_here: int) -> list[Point]:
    """The points to time on a host with so many GPUs. Warns of models that have none.

    Raises:
        UsageError: the host has no GPU, or fewer than asked for, or no point is on these numbers.
    """
    if n_here == 0:
        raise UsageError("no GPU is here that this process may use (CUDA_VISIBLE_DEVICES chooses).")
    if n_here < max(config.gpus, default=1):
        raise UsageError(f"--gpus asks for {max(config.gpus)}, and {n_here} are here.")
    gpus = tuple(dict.fromkeys(config.gpus)) or tuple(2**i for i in range(n_here.bit_length()))
    points, left_out = list[Point](), list[str]()
    for name in dict.fromkeys(config.models):
        model = MODELS[name].along(config.axes)
        if not model.loads:
            left_out.append(f"{name} is not timed along {' or '.join(config.axes)}")
            continue
        of_model = [
            Point(name, load.rows, load.seq_len, axis, n, chunks)
            for load in model.loads
            for n in gpus
            if n >= load.min_gpus
            for axis in (load.axes if n > 1 else ("data",))
            if model.divides(axis, n)
            for chunks in load.time_chunks
        ]
        if not of_model:
            left_out.append(f"{name} needs {model.min_gpus} GPUs or more, which divide it")
        points += of_model
    if not points:
        raise UsageError(f"no point for --gpus {' '.join(map(str, gpus))}: {'; '.join(left_out)}.")
    if left_out:
        warn(f"left out: {'; '.join(left_out)}.")
    return points


def flags_of(point: Point, repeats: int) -> list[str]:
    """The flags of `train_step.py` for a point."""
    rows = str(point.rows * point.sizes.n_parts)
    flags = [*MODELS[point.model].flags.split(), "--seq-len", str(point.seq_len)]
    flags += ["--batch-size", rows, "--mesh", str(point.sizes)]
    flags += ["--time-chunks", str(point.time_chunks)]
    return [*flags, "--repeats", str(repeats), "--profile"]


def efficiencies(points: Mapping[str, Any]) -> dict[Point, float]:
    """Tokens/s of a GPU over those of one GPU without chunks, of the points that can be
    compared."""
    timed = {Point.of(name): numbers for name, numbers in points.items() if "error" not in numbers}
    found: dict[Point, float] = {}
    for point, numbers in timed.items():
        alone = timed.get(point.base)
        if alone is not None and _how(alone) == _how(numbers):
            rate = numbers["tokens_per_second"] / point.n
            found[point] = rate / alone["tokens_per_second"]
    return found


def _how(numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """The kind of GPU, versions and commit, which points that are compared have in common."""
    return kind_of(numbers), numbers["versions"], numbers["commit"]


def kind_of(numbers: Mapping[str, Any]) -> str:
    """The kind of GPU."""
    return re.sub(r"^\d+ x | \(.*", "", numbers["devices"])


def table(points: Mapping[str, Any]) -> markdown.Table:
    """Header and rows, a point each."""
    compared, rows = efficiencies(points), list[list[str]]()
    for name, numbers in points.items():
        point = Point.of(name)
        if "error" in numbers:
            failed = point.model, str(point.sizes), point.batch, numbers["error"]
            rows.append([*failed, *[""] * 6])
            continue
        exchanged = numbers["part_ms"][COMMUNICATION]
        steps = [1e3 * seconds for seconds in numbers["step_seconds"]]
        rows.append(
            [
                f"{point.model} ({numbers['parameters'] / 1e6:,.0f}M)",
                str(point.sizes),
                point.batch,
                f"{numbers['tokens_per_second']:,.0f}",
                f"{compared[point]:.3f}" if point in compared else "",
                percent(numbers["mfu"]) if "mfu" in numbers else "",  # of GPUs that are known
                f"{statistics.median(steps):.0f} ({min(steps):.0f} to {max(steps):.0f})",
                f"{exchanged:.0f} ({numbers['communication_alone_ms']:.0f})",
                f"{numbers['peak_bytes_in_use'] / 1e9:.0f}",
                f"{numbers['compile_seconds']:.0f}",
            ]
        )
    header = ["model", "mesh", "rows x tokens of a GPU", "tokens/s", "efficiency", "MFU"]
    header += ["step (range), ms", "communication (alone), ms", "memory of a GPU, GB", "compile, s"]
    return header, rows


def lines_of(points: Mapping[str, Any], axes: Sequence[str]) -> dict[str, dict[int, float]]:
    """Efficiency by number of GPUs, for each model and axis of these that was timed on several."""
    compared = efficiencies(points)
    lines: dict[str, dict[int, float]] = {}
    for point, efficiency in compared.items():
        if point.n > 1 and point.axis in axes:
            line = lines.setdefault(f"{point.model}, {point.batch}, {point.axis}", {})
            line[point.n] = efficiency
            if (alone := compared.get(point.on_one_gpu)) is not None:
                line[1] = alone
    return lines


def draw(points: Mapping[str, Any], path: Path) -> None:
    """Draws to a PNG how much of one GPU's speed each GPU has where it has rows of its own, and how
    many times as fast several are that share a row, if there are such points."""
    by_rows = lines_of(points, ROWS)
    of_a_row = {
        label: {n: n * efficiency for n, efficiency in line.items()}
        for label, line in lines_of(points, LONG_ROW.axes).items()
    }
    panels = [
        (lines, about)
        for lines, about in (
            (by_rows, "tokens/s of a GPU over those of one GPU"),
            (of_a_row, "tokens/s over those of one GPU without chunks"),
        )
        if lines
    ]
    if not panels:
        warn(f"{path} is not drawn: no point on several GPUs can be compared with one GPU.")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (lines, about) in zip(
        figure.subplots(ncols=len(panels), squeeze=False)[0], panels, strict=True
    ):
        for label, values in lines.items():
            axes.plot(*zip(*sorted(values.items()), strict=True), marker="o", label=label)
        ticks = sorted({n for values in lines.values() for n in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xlabel("GPUs")
        axes.set_ylabel(about)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
