"""The tables of docs/gpus.md."""

from collections.abc import Callable

from benchmarks import compiled_kernels, predictions
from benchmarks.recorded import N_STATE, STEP_GPU, Record, about_recurrence, block, provenance, read
from e88_jax.sizing import PRESETS
from experiments import markdown

COMPILED = "benchmarks/results/compiled_kernels.json"


def compiled() -> str:
    """Kernels compiled for GPUs that were not there."""
    result = read(COMPILED)
    about = provenance({"device": "compiled only", **result})
    command = f"python -m benchmarks.compiled_kernels --json {COMPILED}"
    return block(about, command, markdown.table(*compiled_kernels.table(result["kernels"])))


def as_other_gpus() -> str:
    """Kernels as other GPUs take them, timed on an H100."""
    result = read(predictions.RECORDED)
    named = [x["name"] for x in result["shapes"] if x["as_gpu"] == predictions.TIMED_AS[0]]
    letters, others = ([x for x in named if ("," in x) is own] for own in (False, True))
    command = f"python -m benchmarks.recurrence --no-scan --shapes {' '.join(letters)} "
    command += "".join(f"--shape {sizes} " for sizes in others)
    command += f"--as-gpu {' '.join(predictions.TIMED_AS)} --json {predictions.RECORDED}"
    about = f"{about_recurrence(result)}, {result['dtype']}, forward + backward in ms"
    return block(about, command, markdown.table(*predictions.measured(result["shapes"])))


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
    "as-other-gpus": as_other_gpus,
    "predicted-gpus": predicted,
}
