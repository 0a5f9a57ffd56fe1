"""The plot of a scaling run: measured beside published."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from . import published
from .measure import Row

_FORWARD, _BACKWARD, _STEP, _PUBLISHED = "#0072b2", "#d55e00", "#009e73", "#555555"  # Okabe-Ito


def plot_scaling(rows: list[Row], about: dict[str, Any], image: Path) -> None:
    """Draws throughput, backward over forward and cost per state element into a PNG."""
    rows = sorted(rows, key=lambda row: row["n_state"])
    figure = Figure(figsize=(16, 5.6), layout="constrained")
    config = about["config"]
    figure.suptitle(
        f"{about['device']}, {config['implementation']}, {config['dtype']}, JAX "
        f"{about['versions']['jax']}: batch {config['batch_size']}, {config['seq_len']} steps, "
        f"d_inner {config['d_inner']}, dim {config['dim']}"
    )
    throughput, ratio, cost = figure.subplots(1, 3)
    _plot_throughput(throughput, rows)
    _plot_ratio(ratio, rows)
    _plot_cost(cost, rows)
    ticks = sorted({row["n_state"] for row in rows} | published.TOKENS_PER_SECOND.keys())
    for axes in (throughput, ratio, cost):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("n_state (N = V)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _mark_missing(axes, rows)
        axes.legend(fontsize=9)
    figure.savefig(image, dpi=120)


def _line(axes: Axes, rows: list[Row], key: str, color: str, label: str, marker: str = "o") -> None:
    values = [math.nan if row[key] is None else row[key] for row in rows]  # NaN leaves a gap
    if not all(map(math.isnan, values)):
        sizes = [row["n_state"] for row in rows]
        axes.plot(sizes, values, color=color, label=label, marker=marker)


def _plot_throughput(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Throughput")
    axes.set_ylabel("tokens/s")
    axes.set_yscale("log")
    _line(
        axes,
        rows,
        "recurrence_tokens_per_second",
        _FORWARD,
        "measured: recurrence, forward + backward",
    )
    _line(
        axes,
        rows,
        "training_step_tokens_per_second",
        _STEP,
        "measured: training step of one layer",
        "s",
    )
    _plot_published(axes)
    # Room for the legend.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.25)


def _plot_published(axes: Axes) -> None:
    """Published ranges as bars, an upper bound as an arrow, and a line through all of them."""
    middles = {}
    for n_state, (low, high, text) in published.TOKENS_PER_SECOND.items():
        is_bound = low is None
        middles[n_state] = middle = high if low is None else (low * high) ** 0.5
        axes.errorbar(
            n_state,
            middle,
            yerr=[[0.4 * high if low is None else middle - low], [high - middle]],
            uplims=is_bound,
            color=_PUBLISHED,
            marker="_" if is_bound else "D",
            markersize=9 if is_bound else 5,
            capsize=4,
        )
        axes.annotate(
            text,
            (n_state, middle),
            (-7, -10),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=_PUBLISHED,
            bbox={"color": "white", "alpha": 0.8, "pad": 1},
        )
    axes.plot(
        *zip(*middles.items(), strict=True),
        color=_PUBLISHED,
        linestyle=":",
        label=f"published: {published.DEVICE}, what was run is not stated",
    )


def _plot_ratio(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Backward over forward")
    axes.set_ylabel("time of the backward pass / forward pass")
    low, high = published.BACKWARD_OVER_FORWARD
    axes.axhspan(
        low, high, color=_PUBLISHED, alpha=0.2, label=f"published: {low:.0f}-{high:.0f}", lw=0
    )
    _line(axes, rows, "backward_over_forward", _BACKWARD, "measured")
    axes.set_ylim(0, max(axes.get_ylim()[1], high) * 1.2)


def _plot_cost(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Cost per state element")
    axes.set_ylabel("ps per element of B·T·H·N·V")
    _line(axes, rows, "forward_ps_per_element", _FORWARD, "measured: forward")
    _line(axes, rows, "backward_ps_per_element", _BACKWARD, "measured: backward")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)


def _mark_missing(axes: Axes, rows: list[Row]) -> None:
    missing = [row["n_state"] for row in rows if row["missing"] is not None]
    if missing:
        axes.plot(
            missing,
            [0.03] * len(missing),
            transform=axes.get_xaxis_transform(),
            color="black",
            marker="x",
            linestyle="",
            label="not everything could be timed",
        )
