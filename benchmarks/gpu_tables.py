"""The tables of docs/gpus.md."""

from collections.abc import Callable

from benchmarks import compiled_kernels, predictions, spills
from benchmarks.recorded import N_STATE, STEP_GPU, Record, about_recurrence, block, provenance, read
from e88_jax.sizing import PRESETS
from experiments import markdown

COMPILED = "benchmarks/results/compiled_kernels.json"
SPILLS = "benchmarks/results/spills.json"


def compiled() -> str:
    """Kernels compiled for GPUs that were not there."""
    result = read(COMPILED)
    about = provenance({"device": "compiled only", **result})
    command = f"python -m benchmarks.compiled_kernels --json {COMPILED}"
    return block(about, command, markdown.table(*compiled_kernels.table(result["kernels"])))


def that_spill() -> str:
    """Kernels that spill registers against others that do not, timed on an H100."""
    result = read(SPILLS)
    command = f"python -m benchmarks.spills --processes 14 --repetitions 5 --json {SPILLS}"
    return block(provenance(result), command, markdown.table(*spills.table(result["kernels"])))


def as_other_gpus() -> str:
    """Kernels as other GPUs take them, timed on an H100."""
    result = read(predictions.RECORDED)
    named = f"--shapes {' '.join(_names(result))}"
    about = f"{about_recurrence(result)}, {result['dtype']}, forward + backward in ms"
    table = markdown.table(*predictions.measured(result["shapes"]))
    return block(about, _as_gpus(named, predictions.RECORDED), table)


def by_n_state() -> str:
    """The same by N = V, at equal d_inner."""
    result = read(predictions.BY_N_STATE)
    named = " ".join(f"--shape {name}" for name in _names(result))
    about = f"{about_recurrence(result)}, {result['dtype']}, an element of state in ps"
    table = markdown.table(*predictions.by_n_state(result["shapes"]))
    return block(about, _as_gpus(named, predictions.BY_N_STATE), table)


def _names(result: Record) -> list[str]:
    """Names of the shapes."""
    return list(dict.fromkeys(shape["name"] for shape in result["shapes"]))


def _as_gpus(shapes: str, path: str) -> str:
    """The command that timed these shapes."""
    keys = " ".join(predictions.TIMED_AS)
    return f"python -m benchmarks.recurrence --no-scan {shapes} --as-gpu {keys} --json {path}"


def predicted() -> str:
    """Predictions for GPUs that were not at hand."""
    shapes, points = read(predictions.RECORDED)["shapes"], read(STEP_GPU)["points"]
    point: Record = next(
        x
        for x in points.values()
        if x["config"]["preset"] == "h72n32-500m" and x["config"]["data"]["batch_size"] == 8
    )
    layers = PRESETS[point["config"]["preset"]].config.depth
    published = {"rtx4090": read(N_STATE)["published"]["tokens_per_second"]["32"]}
    return markdown.table(*predictions.gpus(shapes, point, layers, published))


TABLES: dict[str, Callable[[], str]] = {
    "compiled-kernels": compiled,
    "spills": that_spill,
    "as-other-gpus": as_other_gpus,
    "by-n-state": by_n_state,
    "predicted-gpus": predicted,
}
