"""Plots of a run's metrics."""

import contextlib
from pathlib import Path

from .errors import warn
from .metrics import read_metrics


def plot_loss(metrics: Path, image: Path) -> None:
    """Draws training and validation bits per byte over steps from `metrics.jsonl` into a PNG.

    Where the machine refuses, a full disk or memory for example, it is a warning: a run does not
    fail for its plot.
    """
    partial = image.with_name(image.name + ".partial")
    try:
        _draw(metrics, partial)
        partial.replace(image)
    except (OSError, MemoryError, ImportError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        warn(f"{image} is not drawn: {error}.")


def _draw(metrics: Path, image: Path) -> None:
    from matplotlib.figure import Figure  # an OSError without a directory for its cache

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    records = read_metrics(metrics)
    for kind, marker in (("train", ""), ("validation", "o")):
        # A record has no loss if none of its steps had a finite one.
        points = [
            (record["step"], record["bits_per_byte"])
            for record in records
            if record["kind"] == kind and "bits_per_byte" in record
        ]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], label=kind, marker=marker)
        if points and kind == "validation":
            step, bits = min(points, key=lambda point: point[1])
            axes.annotate(
                f"best {bits:.3f} at step {step}",
                (step, bits),
                textcoords="offset points",
                xytext=(0, 18),
                ha="right",
            )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(image, dpi=120, format="png")
