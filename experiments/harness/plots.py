"""Plots of a run's metrics."""

from pathlib import Path

from matplotlib.figure import Figure

from .metrics import read_metrics


def plot_loss(metrics: Path, image: Path) -> None:
    """Draws training and validation bits per byte over steps from `metrics.jsonl` into a PNG."""
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
    figure.savefig(image, dpi=120)
