"""Times the training step over the GPUs of a host: tokens/s, efficiency, communication."""

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import train_step
from benchmarks.measure.flags import require_writable
from benchmarks.measure.gpu_profile import COMMUNICATION
from experiments import cli, markdown
from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.harness.launch import visible_gpus
from experiments.harness.mesh_sizes import MeshSizes, parse_mesh

Table = tuple[list[str], list[list[str]]]


class Model(NamedTuple):
    """A model, with what a GPU has of a batch; however many GPUs there are, it has as much."""

    flags: str
    rows: int
    """Rows of a GPU."""
    forms: tuple[str, ...]
    """Axes of the mesh that all GPUs are on, one at a time."""
    smallest: int = 1
    """GPUs that hold weights and optimizer state."""
    seq_len: int = 2048


MODELS = {
    "500M": Model("--preset h72n32-500m", 16, ("data", "fsdp")),
    "1B": Model("--preset h96n32-1b", 8, ("data", "fsdp")),
    # Models of `python -m e88_jax.sizing 3B --gpu h100`, likewise 7B, of n_state 32.
    "3B": Model(
        "--dim 4416 --n-heads 136 --n-state 32 --depth 31 --remat layer", 4, ("data", "fsdp")
    ),
    "7B": Model(
        "--dim 5440 --n-heads 170 --n-state 32 --depth 47 --remat layer", 4, ("fsdp",), smallest=4
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Time the training step of train_byte_lm.py on random bytes over several GPUs of this host,
    each GPU with as many rows, and compare with one GPU. Each point is a process of its own.

    Efficiency is the tokens/s of a GPU over those of the same model on one GPU in the same file: a
    file holds the points of one machine.
    """

    models: tuple[str, ...] = tuple(MODELS)
    """Models by their parameters."""
    gpus: tuple[int, ...] = ()
    """Numbers of GPUs; none for 1, 2, 4, ... up to those that are there."""
    repeats: int = 10
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
        if self.missing and self.json is None:
            raise ValueError("--missing is for --json.")


class Point(NamedTuple):
    """A model on a mesh."""

    model: str
    mesh: MeshSizes

    def __str__(self) -> str:
        return f"{self.model}, {self.mesh}"


def main(args: Sequence[str]) -> None:
    """Parses, times each point, prints the table."""
    config = cli.parse(ScalingConfig, args)
    require_writable(config.json)
    require_writable(config.plot)
    points = train_step.recorded_points(config.json)
    for point in points_of(config, visible_gpus(os.environ)):
        name = str(point)
        if config.missing and "error" not in points.get(name, {"error": "not timed yet"}):
            continue
        print(name, flush=True)
        points[name] = train_step.measure_apart(flags_of(point, config.repeats))
        train_step.record(config.json, {"points": points})
        print(points[name].get("error") or train_step.summary(points[name]), flush=True)
    print("\n" + markdown.table(*table(points)))
    if config.plot is not None:
        draw(points, config.plot)


def points_of(config: ScalingConfig, n_here: int) -> list[Point]:
    """The points to time on a host with so many GPUs.

    Raises:
        UsageError: it has fewer than asked for, or than any of the models needs.
    """
    if n_here < max(config.gpus, default=1):
        raise UsageError(f"--gpus asks for {max(config.gpus, default=1)}, and {n_here} are here.")
    gpus = config.gpus or [2**i for i in range(n_here.bit_length())]
    points = [
        Point(name, MeshSizes(**{form: n}))
        for name in config.models
        for n in gpus
        if n >= MODELS[name].smallest
        for form in MODELS[name].forms[: 1 if n == 1 else None]
    ]
    if not points:
        needed = ", ".join(f"{name} needs {MODELS[name].smallest}" for name in config.models)
        raise UsageError(f"no point on {', '.join(map(str, gpus))} GPUs: {needed}.")
    return points


def flags_of(point: Point, repeats: int) -> list[str]:
    """The flags of `train_step.py` for a point."""
    model, mesh = MODELS[point.model], point.mesh
    rows = str(model.rows * mesh.n_devices)
    flags = [*model.flags.split(), "--seq-len", str(model.seq_len), "--batch-size", rows]
    return [*flags, "--mesh", str(mesh), "--repeats", str(repeats), "--profile"]


def efficiencies(points: Mapping[str, Any]) -> dict[str, float]:
    """Tokens/s of a GPU over those of one GPU, of the points that can be compared."""
    per_gpu = {
        name: point["tokens_per_second"] / n_devices(point)
        for name, point in points.items()
        if "error" not in point
    }
    found: dict[str, float] = {}
    for name, rate in per_gpu.items():
        alone = str(Point(name.partition(",")[0], MeshSizes()))
        if alone in per_gpu:
            found[name] = rate / per_gpu[alone]
    return found


def n_devices(point: Mapping[str, Any]) -> int:
    """GPUs of a point."""
    sizes = parse_mesh(point["config"]["mesh"], point["config"]["batch"]["batch_size"])
    assert sizes is not None, "a point names its mesh"
    return sizes.n_devices


def table(points: Mapping[str, Any]) -> Table:
    """Header and rows, a point each."""
    compared, rows = efficiencies(points), list[list[str]]()
    for name, point in points.items():
        model, _, mesh = name.partition(", ")
        if "error" in point:
            rows.append([model, mesh, "", point["error"], *[""] * 6])
            continue
        batch, n, parts = point["config"]["batch"], n_devices(point), point["part_ms"]
        rows.append(
            [
                f"{model} ({point['parameters'] / 1e6:,.0f}M)",
                mesh,
                f"{batch['seq_len']} x {batch['batch_size'] // n}",
                f"{point['tokens_per_second']:,.0f}",
                f"{compared[name]:.3f}" if name in compared else "",
                f"{100 * point['mfu']:.0f} %",
                f"{1e3 * statistics.median(point['step_seconds']):.0f}",
                f"{parts[COMMUNICATION]:.0f} ({point['exposed_communication_ms']:.0f})",
                f"{point['peak_bytes_in_use'] / 1e9:.0f}",
                f"{point['compile_seconds']:.0f}",
            ]
        )
    header = [
        "model",
        "mesh",
        "tokens x rows of a GPU",
        "tokens/s",
        "efficiency",
        "MFU",
        "step, ms",
    ]
    header += ["communication (alone), ms", "memory of a GPU, GB", "compile, s"]
    return header, rows


def draw(points: Mapping[str, Any], path: Path) -> None:
    """Efficiency against the number of GPUs, a line for each model and axis."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, float]] = {}
    for name, efficiency in efficiencies(points).items():
        model, n = name.partition(",")[0], n_devices(points[name])
        forms = MODELS[model].forms if n == 1 else (name.partition(", ")[2].partition("=")[0],)
        for form in forms:
            lines.setdefault(f"{model}, {form}", {})[n] = efficiency
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in lines.items():
        axes.plot(*zip(*sorted(values.items()), strict=True), marker="o", label=label)
    ticks = sorted({n for values in lines.values() for n in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s of a GPU over those of one GPU")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
